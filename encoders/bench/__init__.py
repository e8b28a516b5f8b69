"""Timing of encoders."""

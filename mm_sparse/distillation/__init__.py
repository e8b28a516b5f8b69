"""Losses that train scorers."""

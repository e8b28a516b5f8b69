"""Rank key blocks for query tiles."""

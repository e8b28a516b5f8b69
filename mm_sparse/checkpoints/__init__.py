"""Scorers on disk, and those that ship."""

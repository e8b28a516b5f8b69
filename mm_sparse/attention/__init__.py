"""Exact attention on a selection, and scoring, selection and attention in one call."""

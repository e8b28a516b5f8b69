"""Sparse attention in the attention layers of other libraries."""

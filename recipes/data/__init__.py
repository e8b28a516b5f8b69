"""Samples, batches and readers of files."""

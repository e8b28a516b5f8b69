"""The command mm-sparse."""

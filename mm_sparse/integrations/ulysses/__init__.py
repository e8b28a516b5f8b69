"""Sequence parallelism by heads: tokens are split between ranks outside of attention."""

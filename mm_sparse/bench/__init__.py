"""Timing of attention beside dense and sparse baselines."""

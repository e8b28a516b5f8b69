"""Layers that stay as they were while no call of theirs is long enough to run sparse."""

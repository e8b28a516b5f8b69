"""Objectives, optimizers and sharding."""

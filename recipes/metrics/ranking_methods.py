"""Ranking methods that tables compare."""

from __future__ import annotations

from collections.abc import Callable

from mm_sparse import PooledScorer, Scorer
from mm_sparse.scorers import Nearest, NearestAndRandom, OracleScorer

METHODS: dict[str, Callable[[], Scorer] | None] = {
    "window": Nearest,
    "bigbird": NearestAndRandom,
    "pooled": PooledScorer,
    "scorers": None,
    "one ratio": None,
    "perfect": OracleScorer,
}
"""None stands for the model's own scorers, with its budgets of layers and heads or without."""

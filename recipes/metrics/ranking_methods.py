"""Ranking methods that tables compare."""

from __future__ import annotations

from collections.abc import Callable

from mm_sparse import PooledScorer, Scorer
from mm_sparse.scorers import BigBird, OracleScorer, SlidingWindow

METHODS: dict[str, Callable[[], Scorer] | None] = {
    "window": SlidingWindow,
    "bigbird": BigBird,
    "pooled": PooledScorer,
    "scorers": None,
    "one ratio": None,
    "oracle": OracleScorer,
}
"""None stands for the model's own scorers, with its budgets of layers and heads or without."""

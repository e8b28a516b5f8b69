"""Scorers by name."""

from __future__ import annotations

from mm_sparse.scorers.base import Scorer
from mm_sparse.scorers.fine import FineScorer
from mm_sparse.scorers.relevance import RelevanceScorer

SCORERS: dict[str, type[Scorer]] = {"relevance": RelevanceScorer, "fine": FineScorer}

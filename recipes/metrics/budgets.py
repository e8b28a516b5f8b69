"""Budgets of shipped scorers at another ratio."""

from __future__ import annotations

from typing import Any

from mm_sparse import SparseConfig


def budgets_of(config: SparseConfig, method: str, ratio: float) -> dict[str, Any]:
    """Fields that make a config keep `ratio`, with its own budgets only for its own scorers."""
    if method != "scorers":
        return {"ratio": ratio, "layer_ratio": {}, "query_ratio": {}}
    scaled = config.scaled(ratio)
    return {"ratio": ratio, "layer_ratio": scaled.layer_ratio, "query_ratio": scaled.query_ratio}

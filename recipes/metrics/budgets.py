"""Budgets of shipped scorers at another ratio."""

from __future__ import annotations

from typing import Any

from mm_sparse import SparseConfig


def scaled_budgets(config: SparseConfig, ratio: float) -> dict[str, Any]:
    """Fields that make a config keep `ratio`, its budgets of layers and heads scaled alike."""
    part = ratio / config.ratio

    def scaled(own: Any) -> Any:
        return tuple(map(scaled, own)) if isinstance(own, tuple) else min(own * part, 1.0)

    own = {layer: scaled(ratios) for layer, ratios in config.layer_ratio.items()}
    return {"ratio": ratio, "layer_ratio": own}


def budgets_of(config: SparseConfig, method: str, ratio: float) -> dict[str, Any]:
    """Fields that make a config keep `ratio`, with its own budgets only for its own scorers."""
    if method != "scorers":
        return {"ratio": ratio, "layer_ratio": {}}
    return scaled_budgets(config, ratio)

"""Scorers that are asked for by name, and made for a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mm_sparse.integrations.discovery import scorer_shape
from mm_sparse.integrations.layer import SparseLayer
from mm_sparse.scorers import Scorer, registered_scorers


def make_scorer(
    layer: SparseLayer,
    scorer: str | Callable[..., Scorer] | None,
    kept: Scorer | None,
    strict: bool,
) -> Scorer | None:
    """The scorer that `sparsify` was asked for; `kept` if it asks for that kind or for nothing."""
    if scorer is None:
        return kept
    make: Any = registered_scorers()[scorer] if isinstance(scorer, str) else scorer
    if isinstance(scorer, str) and isinstance(kept, make):
        return kept
    try:
        heads, kv_heads, dim = scorer_shape(layer.module)
    except ValueError as error:
        if strict:
            raise layer.error(error) from None
        return None
    made = make(num_query_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
    return made.to(device_of(layer))


def device_of(layer: SparseLayer) -> torch.device:
    """Where the scorer of a layer begins; it follows the queries of the first call.

    Weights that are kept elsewhere and fetched for a call stand on "meta": the scorer's are few.
    """
    weight = next(layer.module.parameters(), None)
    known = weight is not None and weight.device.type != "meta"
    return weight.device if known and weight is not None else torch.device("cpu")

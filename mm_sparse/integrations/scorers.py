"""Scorers of layers: made by name, and held as a submodule of a model that is trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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


# Name of the submodule that holds the scorers of a model.
SCORERS = "mm_sparse_scorers"


class RegisteredScorers(nn.ModuleDict):
    """The scorers of a model as a submodule of it: the very modules that its layers use."""

    def __init__(self, scorers: nn.ModuleDict) -> None:
        super().__init__(dict(scorers.items()))
        self.register_load_state_dict_pre_hook(_allow_none)


def hold_scorers(model: nn.Module, scorers: nn.ModuleDict) -> None:
    """Make scorers a submodule of a model, in place of those that it had."""
    model._modules[SCORERS] = RegisteredScorers(scorers)


def _allow_none(scorers: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    if any(key.startswith(prefix) for key in state):
        return
    warnings.warn(
        "the checkpoint holds no scorers, those of the model stay as they are: it was made "
        "without `mms.register_scorers`",
        stacklevel=2,
    )
    state.update({prefix + key: value for key, value in scorers.state_dict().items()})

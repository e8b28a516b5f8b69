"""What `sparsify` did to a model, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mm_sparse.config import SparseConfig
from mm_sparse.integrations.hf.modality_tracker import ModalityTracker
from mm_sparse.integrations.layer import SparseLayer
from mm_sparse.integrations.shared_state import Shared
from mm_sparse.integrations.tower_tokens import TowerTokens
from mm_sparse.integrations.towers.patch_order import OrderedBlocks

STATE = "_mm_sparse"


@dataclass(eq=False)
class State:
    """What `sparsify` did to a model."""

    shared: Shared
    layers: dict[str, SparseLayer]
    trackers: list[ModalityTracker]
    towers: list[TowerTokens]
    blocks: list[OrderedBlocks]
    handles: list[Any] = field(default_factory=list)
    modules: tuple[type[nn.Module], ...] = ()
    """Classes that `sparsify(modules=...)` named."""
    before: list[tuple[Any, str]] = field(default_factory=list)
    """Configs and the attention implementation that each named."""


def sparse_config(model: nn.Module) -> SparseConfig:
    """The config of a sparsified model."""
    return state_of(model).shared.config


def attention_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The attention layers of a sparsified model by name."""
    return dict(state_of(model).layers)


def scorers_of(model: nn.Module) -> nn.ModuleDict:
    """The scorers of a sparsified model; "/" stands for "." in the names of layers."""
    found = {n: la.scorer for n, la in state_of(model).layers.items() if la.scorer is not None}
    return nn.ModuleDict({name.replace(".", "/"): scorer for name, scorer in found.items()})


def scorer_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What an optimizer trains when only scorers are trained."""
    return scorers_of(model).parameters()


def state_of(model: nn.Module) -> State:
    state = vars(model).get(STATE)
    if state is None:
        raise ValueError(f"model must be sparsified, got a {type(model).__name__} that is not")
    return state

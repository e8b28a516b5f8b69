"""Other attention in the place of a sparsified model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mm_sparse.integrations.call import AttentionCall
from mm_sparse.integrations.state import attention_layers, state_of
from mm_sparse.scorers import Scorer


@contextmanager
def override_attention(
    model: nn.Module, attention_override: Callable[[AttentionCall], Tensor]
) -> Iterator[None]:
    """Have the layers that would run sparse attend by `attention_override`, around a block.

    It gets a call without scores and selection, and gives (B, H, N, D) in the order of
    `call.layout`. Gradients pass.
    """
    shared = next(iter(attention_layers(model).values())).shared
    before, shared.attention_override = shared.attention_override, attention_override
    try:
        yield
    finally:
        shared.attention_override = before


@contextmanager
def override_config(model: nn.Module, **changes: Any) -> Iterator[None]:
    """The same layers and scorers with other fields of their config, around a block."""
    shared = state_of(model).shared
    before, shared.config = shared.config, replace(shared.config, **changes)
    try:
        yield
    finally:
        shared.config = before


@contextmanager
def set_modality(model: nn.Module, modality: Tensor) -> Iterator[None]:
    """Say what each position is where no ids do (`inputs_embeds`), or instead of them.

    Args:
        modality: (B, M) of `Modality` values, from the first token of the sequence on; tokens
            behind are what their ids say, or text.
    """
    if not isinstance(modality, Tensor) or modality.dim() != 2 or modality.is_floating_point():
        raise ValueError(f"modality must be a (batch, tokens) tensor of integers, got {modality!r}")
    trackers = state_of(model).trackers
    if not trackers:
        raise ValueError(f"model must hold a transformers model, got {type(model).__name__}")
    for tracker in trackers:
        tracker.given = modality
    try:
        yield
    finally:
        for tracker in trackers:
            tracker.given = None


@contextmanager
def capture_attention(
    model: nn.Module, watcher: Callable[[AttentionCall], None], *, timed: bool = False
) -> Iterator[None]:
    """Call `watcher` after every attention call, with q, k, v, scores and selection.

    All of a call is in one order, that of `call.layout`: a picture with a known grid is in patch
    order (`AttentionCall` says how to get the model's order back). Scores carry no graph: call the
    scorer on `call.q` and `call.k` for one (`distillation_losses` does).
    A layer under gradient checkpointing is called once more in the backward pass: losses gathered
    there count double.
    """
    shared = state_of(model).shared
    shared.watchers.append(watcher)
    before, shared.timed = shared.timed, timed or shared.timed
    try:
        yield
    finally:
        shared.watchers.remove(watcher)
        shared.timed = before


@contextmanager
def override_scorers(
    model: nn.Module, make: Callable[[], Scorer] | Mapping[str, Scorer] | None
) -> Iterator[None]:
    """The layers of a sparsified model with other scorers, around a block.

    Args:
        make: called once a layer, or scorers by name of the layer; None changes nothing.
    """
    served = attention_layers(model)
    before = {name: layer.scorer for name, layer in served.items()}
    try:
        if isinstance(make, Mapping):
            for name, scorer in make.items():
                served[name].scorer = scorer
        elif make is not None:
            for layer in served.values():
                layer.scorer = make()
        yield
    finally:
        for name, layer in served.items():
            layer.scorer = before[name]

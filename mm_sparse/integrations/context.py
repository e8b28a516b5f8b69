"""Other attention, settings, scorers or modality in a sparsified model, around a block of code.

All of them hold for the thread, or the asyncio task, that entered the block. A checkpoint that
computes a block of the model again, in the backward pass, attends as in its forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mm_sparse.integrations.call import AttentionCall
from mm_sparse.integrations.forward_context import assigned
from mm_sparse.integrations.shared_state import counted_as_changed
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
    with state_of(model).shared.changed(attention_override=attention_override):
        yield


@contextmanager
def override_config(model: nn.Module, **changes: Any) -> Iterator[None]:
    """The same layers and scorers with other fields of their config, around a block.

    Another `ratio` scales the budgets of `layer_ratio`, `head_ratio` and `query_ratio` alike,
    unless one of these is given as well.

    Example:
        >>> with mms.override_config(model, ratio=0.1):
        ...     logits = model(ids).logits
    """
    shared = state_of(model).shared
    config = shared.config
    if "ratio" in changes and not {"layer_ratio", "head_ratio", "query_ratio"} & set(changes):
        config = config.scaled(changes["ratio"])
    with shared.changed(config=replace(config, **changes)):
        yield


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
    with ExitStack() as stack:
        stack.enter_context(counted_as_changed())
        for tracker in trackers:
            stack.enter_context(assigned(tracker, replace(tracker.running, given=modality)))
        yield


@contextmanager
def capture_attention(
    model: nn.Module,
    watcher: Callable[[AttentionCall], None],
    *,
    timed: bool = False,
    scores: bool = True,
) -> Iterator[None]:
    """Call `watcher` after every attention call, with q, k, v, scores and selection.

    All of a call is in one order, that of `call.layout`: an image with a known grid is in patch
    order (`AttentionCall` says how to get the model's order back). Scores carry no graph: call the
    scorer on `call.q` and `call.k` for one (`distillation_losses` does).
    Each call is shown once: not again where a checkpoint computes it again in the backward pass.

    Args:
        timed: measure the seconds of each call; waits for the device.
        scores: show scores and selection, which are then made for all queries at once. Without, a
            layer computes what it computes when nobody watches.
    """
    shared = state_of(model).shared
    now = shared.settings
    shown = {"timed": timed or now.timed, "scored": scores or now.scored}
    with shared.changed(watchers=(*now.watchers, watcher), **shown):
        yield


@contextmanager
def override_scorers(
    model: nn.Module, make: Callable[[], Scorer] | Mapping[str, Scorer] | None
) -> Iterator[None]:
    """The layers of a sparsified model with other scorers, around a block.

    Args:
        make: called once a layer, or scorers by name of the layer; None changes nothing.
    """
    shared, layers = state_of(model).shared, attention_layers(model)
    scorers = dict(shared.settings.scorers)
    if isinstance(make, Mapping):
        scorers |= {layers[name].name: scorer for name, scorer in make.items()}
    elif make is not None:
        scorers |= {layer.name: make() for layer in layers.values()}
    with shared.changed(scorers=scorers):
        yield

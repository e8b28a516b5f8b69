"""Scorers of a model, to a folder and back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from mm_sparse.checkpoints.format import read_scorers, write_scorers
from mm_sparse.checkpoints.pretrained import scorers_folder
from mm_sparse.config import SparseConfig
from mm_sparse.integrations import (
    ModuleAdapter,
    State,
    densify,
    find_all,
    hold_scorers,
    is_sparsified,
    scorers_of,
    sparsify,
    state_of,
)

M = TypeVar("M", bound=nn.Module)


def save_scorers(model: nn.Module, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the scorers of a sparsified model: safetensors, and JSON with one entry per layer.

    Args:
        dtype: of the weights in the file, theirs if None.
    Raises:
        ValueError: the model is not sparsified.

    Example:
        >>> mms.save_scorers(model, "scorers")
    """
    state = state_of(model)
    # A model that wraps the sparsified one has other names for its layers.
    renamed = {layer.name: name for name, layer in state.layers.items()}
    config = state.shared.config.with_layers_renamed(renamed)
    write_scorers(state.layers, config, Path(folder), dtype)


def load_scorers(
    model: M,
    folder: str | Path,
    *,
    modules: Sequence[type[nn.Module]] = (),
    budgets: bool = True,
) -> M:
    """Read what `save_scorers` wrote; a model that is not sparsified is, with the stored config.

    A sparsified model keeps its config and gets the stored budgets of layers and heads, scaled to
    its ratio, unless it has budgets of its own.

    Args:
        folder: of `save_scorers`, or the name of scorers that come with the package
            (`mms.list_pretrained()`).
        modules: as in `sparsify`, for a model that is not sparsified.
        budgets: whether a sparsified model gets the stored budgets; False leaves it one ratio.
    Raises:
        ValueError: the files are missing, or are of another model's layers; the model is then as
            it was.

    Example:
        >>> mms.load_scorers(model, "smollm2-135m")
    """
    stored = read_scorers(scorers_folder(folder))
    was_sparse = is_sparsified(model)
    if not was_sparse:
        adapters = (ModuleAdapter(modules),) if modules else ()
        names = [module.name for module in find_all(model, adapters)]
        stored = stored.named_as(names)
        if names:
            stored.check_layers(names)
        sparsify(model, stored.config, modules=modules)
    state = state_of(model)
    try:
        stored = stored.named_as(list(state.layers))
        stored.install(state.layers)
    except BaseException:
        if not was_sparse:
            densify(model)
        raise
    if was_sparse and budgets:
        _take_budgets(state, stored.config)
    for holder in state.holders:
        hold_scorers(holder, scorers_of(holder))
    return model


def _take_budgets(state: State, stored: SparseConfig) -> None:
    """Give a sparsified model the budgets that were stored with its scorers."""
    config = state.shared.base.config
    if not stored.layer_ratio or config.layer_ratio == stored.layer_ratio:
        return
    if config.layer_ratio or config.head_ratio:
        warnings.warn(
            "the model keeps its own layer_ratio or head_ratio: the budgets that were stored with "
            "the scorers are not used",
            stacklevel=3,
        )
        return
    own = {name: layer.name for name, layer in state.layers.items()}
    ratios = stored.scaled(config.ratio).with_layers_renamed(own).layer_ratio
    state.shared.base = replace(state.shared.base, config=replace(config, layer_ratio=ratios))

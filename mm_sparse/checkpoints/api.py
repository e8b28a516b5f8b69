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
from mm_sparse.checkpoints.hub import is_hub_name, push_folder
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


def save_scorers(
    model: nn.Module,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    push: str | None = None,
    private: bool | None = None,
) -> None:
    """Write the scorers of a sparsified model: safetensors, and JSON with one entry per layer.

    Of a model that FSDP2 has sharded, every process calls this, and the first one writes.

    Args:
        dtype: of the weights in the file, theirs if None.
        push: repository of the Hugging Face hub, "owner/name", to which the folder goes as well.
        private: of a repository that is made for it; the owner's default if None.
    Raises:
        ValueError: the model is not sparsified, or `push` is no name of a repository.

    Example:
        >>> mms.save_scorers(model, "scorers")
    """
    state = state_of(model)
    if push is not None and not is_hub_name(push):
        raise ValueError(f'push must be a repository as "owner/name", got {push!r}')
    # A model that wraps the sparsified one has other names for its layers.
    renamed = {layer.name: name for name, layer in state.layers.items()}
    config = state.shared.config.with_layers_renamed(renamed)
    write_scorers(state.layers, config, Path(folder), dtype)
    if push is not None:
        push_folder(Path(folder), push, private)


def load_scorers(
    model: M,
    folder: str | Path,
    *,
    ratio: float | None = None,
    modules: Sequence[type[nn.Module]] = (),
    budgets: bool = True,
    revision: str | None = None,
) -> M:
    """Read what `save_scorers` wrote; a model that is not sparsified is, with the stored config.

    A sparsified model keeps its config and gets the stored budgets of layers, heads and modalities,
    scaled to its ratio, in place of budgets of its own.

    Args:
        folder: of `save_scorers`, or the name of scorers that come with the package
            (`mms.list_pretrained()`), or of a repository of the Hugging Face hub, "owner/name",
            which is fetched.
        ratio: share of keys that the model keeps from now on; budgets are scaled to it. The stored
            one, or the sparsified model's, if None.
        modules: as in `sparsify`, for a model that is not sparsified.
        budgets: whether a sparsified model gets the stored budgets; False leaves it its own.
        revision: branch, tag or commit of a repository.
    Raises:
        ValueError: the files are missing, or are of another model's layers; the model is then as
            it was.

    Example:
        >>> mms.load_scorers(model, "smollm2-135m", ratio=0.1)
    """
    stored = read_scorers(scorers_folder(folder, revision))
    was_sparse = is_sparsified(model)
    wanted = stored.config if ratio is None else stored.config.scaled(ratio)
    if not was_sparse:
        adapters = (ModuleAdapter(modules),) if modules else ()
        names = [module.name for module in find_all(model, adapters)]
        stored = replace(stored, config=wanted).named_as(names)
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
    if was_sparse:
        _take_budgets(state, stored.config, ratio, budgets)
    for holder in state.holders:
        hold_scorers(holder, scorers_of(holder))
    return model


def _take_budgets(state: State, stored: SparseConfig, ratio: float | None, budgets: bool) -> None:
    """Give a sparsified model a ratio, and the budgets that were stored with its scorers."""
    before = state.shared.base.config
    config = before if ratio is None else before.scaled(ratio)
    if budgets and (stored.layer_ratio or stored.head_ratio or stored.query_ratio):
        own = {name: layer.name for name, layer in state.layers.items()}
        scaled = stored if stored.ratio == config.ratio else stored.scaled(config.ratio)
        scaled = scaled.with_layers_renamed(own)
        names = ("layer_ratio", "head_ratio", "query_ratio")
        taken = {name: getattr(scaled, name) for name in names}
        kept = {name: getattr(before, name) for name in names}
        if any(kept[name] and kept[name] != taken[name] for name in names):
            warnings.warn(
                "the model's own layer_ratio, head_ratio and query_ratio give way to the budgets "
                f"that were stored with the scorers, scaled to ratio {config.ratio:g}; "
                "budgets=False keeps the model's own",
                stacklevel=3,
            )
        config = replace(config, **taken)
    if config != before:
        state.shared.base = replace(state.shared.base, config=config)

"""Scorers of a model, to a folder and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from mm_sparse.checkpoints.format import read_scorers, write_scorers
from mm_sparse.checkpoints.pretrained import scorers_folder
from mm_sparse.integrations import (
    ModuleAdapter,
    densify,
    find_all,
    is_sparsified,
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


def load_scorers(model: M, folder: str | Path, *, modules: Sequence[type[nn.Module]] = ()) -> M:
    """Read what `save_scorers` wrote; a model that is not sparsified is, with the stored config.

    Args:
        folder: of `save_scorers`, or the name of scorers that come with the package
            (`mms.list_pretrained()`).
        modules: as in `sparsify`, for a model that is not sparsified.
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
        stored = stored.named_as([found.name for found in find_all(model, adapters)])
        sparsify(model, stored.config, modules=modules)
    known = state_of(model).layers
    try:
        stored.named_as(list(known)).install(known)
    except BaseException:
        if not was_sparse:
            densify(model)
        raise
    return model

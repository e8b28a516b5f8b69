"""Towers of transformers whose attention is given the bounds of the sequences of a packed row."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mm_sparse.integrations.discovery import forward_source
from mm_sparse.integrations.forward_context import uncompiled

BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Arguments of an attention call that cut a packed row."""


@cache
def attends_within_bounds(cls: type) -> bool:
    """Whether the class's forward makes one call for all sequences of a packed row.

    It does where the name of the attention implementation contains "flash"; else it calls
    attention for one sequence after the other.
    """
    source = forward_source(cls)
    return "is_flash_attention_requested(" in source and "cu_seq_lens_q=" in source


@cache
def joins_images(cls: type) -> bool:
    """Whether a vision model lays images of its own batch into one row, as Pixtral does.

    It masks images from each other by a tensor of all pairs of patches, unless the name of the
    attention implementation contains "flash".
    """
    return "generate_block_attention_mask(" in forward_source(cls)


class PackedTower:
    """Gives the attention of a tower bounds of its own images or clips, and none of a text.

    transformers hands the keyword arguments of the whole model, with bounds of packed text among
    them, on to its towers.
    """

    memory: Any = None

    def __init__(self, tower: Any) -> None:
        self.tower = tower
        self.joins = joins_images(type(tower))
        self._names = list(inspect.signature(type(tower).forward).parameters)[1:]

    def attach(self) -> list[Any]:
        """Set the hook on the tower; returns its handle."""
        return [self.tower.register_forward_pre_hook(self._give_bounds, with_kwargs=True)]

    def _give_bounds(self, tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook."""
        if self.joins:
            return self._give_own_bounds(tower, args, kwargs)
        return args, {name: x for name, x in kwargs.items() if name not in BOUNDS}

    @uncompiled
    def _give_own_bounds(self, tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        bounds = _bounds_of_images(given["pixel_values"], given.get("image_sizes"), tower)
        own = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "is_causal": False}
        return args, {**{name: x for name, x in kwargs.items() if name not in BOUNDS}, **own}


def _bounds_of_images(pixels: Tensor, sizes: Any, tower: Any) -> Tensor:
    """(images + 1,) int32: where each image begins, of (height, width) in pixels each."""
    patch = tower.patch_size
    if sizes is None:
        sizes = [pixels.shape[-2:]] * len(pixels)
    elif isinstance(sizes, Tensor):
        sizes = sizes.tolist()
    tokens = [(height // patch) * (width // patch) for height, width in sizes]
    return torch.tensor([0, *tokens], device=pixels.device).cumsum(0).to(torch.int32)

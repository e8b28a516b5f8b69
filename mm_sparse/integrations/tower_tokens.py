"""What is known of the tokens of a vision or audio tower."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from mm_sparse.integrations.forward_context import (
    ForwardMemory,
    assign,
    current,
    refuse_export,
    uncompiled,
)
from mm_sparse.integrations.standby.standby import Standby
from mm_sparse.layout import TokenLayout
from mm_sparse.modality import Modality


@dataclass(frozen=True)
class _Image:
    """The image or video of the running forward of a tower."""

    grid: tuple[int, ...] | None = None
    outer: _Image | None = None
    """That of the forward around it."""


@dataclass(eq=False)
class TowerTokens:
    """What is known of the tokens of a tower."""

    modality: Modality
    prefix: int = 0
    """Class and register tokens in front."""
    grid: tuple[int, ...] | None = None
    """Sides in tokens of every image (height, width) or video (frames, height, width); None where
    they differ or it is unknown."""
    embed: Any = None
    """The module that gets images and cuts them into patches; it tells the grid of each."""
    patch: tuple[int, int] | None = None
    """Height and width of a patch in pixels; None where `embed` tells the grid of any size."""
    tubelet: int | None = None
    """Frames that a token of a video covers; None for towers of images."""
    owner: Any = None
    """The tower, if `embed` is given: with its forward ends what is known of an image."""
    memory: ForwardMemory | None = None
    """Finds the grid of an image again where a checkpoint computes blocks again."""
    most_tokens: int | None = None
    """Of an image or video of the size that the tower is made for; None where it is made for any.
    Of another size `embed` must tell."""
    standby: Standby | None = None
    """The layers of the tower, where they are wrapped only while something needs it."""

    def attach(self) -> list[Any]:
        """Set the hooks that note the grid of the image of a forward; returns their handles."""
        if self.embed is None:
            return []
        handles = [self.embed.register_forward_pre_hook(self.look)]
        if self.owner is not None:
            handles.append(self.owner.register_forward_pre_hook(self.enter))
            handles.append(self.owner.register_forward_hook(self.leave, always_call=True))
        return handles

    @uncompiled
    def enter(self, owner: Any, args: Any) -> None:
        """Forward pre-hook of the tower: a forward inside another has an image of its own."""
        assign(self, _Image(outer=current(self)))

    @uncompiled
    def leave(self, owner: Any, args: Any, output: Any) -> None:
        """Forward hook of the tower."""
        image = current(self)
        assign(self, None if image is None else image.outer)

    @uncompiled
    def look(self, embed: Any, args: tuple[Any, ...]) -> None:
        """Forward pre-hook."""
        refuse_export()
        grid = self._grid(embed, args[0] if args else None)
        if self.standby is not None:
            self.standby.see(None if grid is None else prod(grid) + self.prefix)
        image = current(self)
        assign(self, _Image(grid, None if image is None else image.outer))
        if self.memory is not None and torch.is_grad_enabled():
            self.memory.attach()

    def _grid(self, embed: Any, pixels: Any) -> tuple[int, ...] | None:
        """Of images (B, C, height, width), or of videos (B, frames, C, height, width)."""
        if not isinstance(pixels, Tensor) or pixels.dim() not in (4, 5):
            return None
        height, width = pixels.shape[-2:]
        if pixels.dim() == 5:
            if self.tubelet is None or self.patch is None:
                return None
            # A video of fewer frames than a token covers is repeated.
            frames = max(pixels.shape[1] // self.tubelet, 1)
            return frames, height // self.patch[0], width // self.patch[1]
        if self.patch is not None:
            return height // self.patch[0], width // self.patch[1]
        height, width = embed.dynamic_feat_size((height, width))
        return int(height), int(width)

    def grid_of(self, tokens: int) -> tuple[int, ...] | None:
        """The grid of the running forward's image or video, if it is that of so many tokens."""
        image = current(self)
        grid = self.grid if image is None else image.grid
        if grid is None or prod(grid) != tokens - self.prefix:
            return None
        return grid


def with_grid(layout: TokenLayout, prefix: int, grid: tuple[int, ...] | None) -> TokenLayout:
    """Make the prefix a segment of its own, and note the grid of a whole image or video."""
    behind = torch.arange(layout.length, device=layout.device) >= prefix
    segment = layout.segment + behind.to(torch.int32) if prefix else layout.segment
    grids = layout.grids
    if grid is not None and bool(layout.valid.all()):
        grids = tuple({number: grid} for number in segment[:, prefix].tolist())
    return replace(layout, segment=segment, grids=grids, memo={})

"""What is known of the tokens of a vision or audio tower."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mm_sparse.layout import TokenLayout
from mm_sparse.modality import Modality


@dataclass(eq=False)
class TowerTokens:
    """What is known of the tokens of a tower."""

    modality: Modality
    prefix: int = 0
    """Class and register tokens in front."""
    grid: tuple[int, int] | None = None
    """Height and width of the picture that is looked at, in tokens."""
    embed: Any = None
    """The module that gets pictures and cuts them into patches."""
    patch: tuple[int, int] | None = None
    """Height and width of a patch in pixels; None where `embed` tells the grid of any size."""

    def attach(self) -> list[Any]:
        """Set the hook that keeps `grid` up to date; returns its handle."""
        return [] if self.embed is None else [self.embed.register_forward_pre_hook(self.look)]

    def look(self, embed: Any, args: tuple[Any, ...]) -> None:
        """Forward pre-hook."""
        picture = args[0] if args else None
        self.grid = None
        if isinstance(picture, Tensor) and picture.dim() == 4:
            height, width = picture.shape[-2:]
            if self.patch is not None:
                self.grid = height // self.patch[0], width // self.patch[1]
            else:
                height, width = embed.dynamic_feat_size((height, width))
                self.grid = int(height), int(width)

    def grid_of(self, tokens: int) -> tuple[int, int] | None:
        """The grid, if it is that of a sequence of so many tokens."""
        if self.grid is None or self.grid[0] * self.grid[1] != tokens - self.prefix:
            return None
        return self.grid


def part_of_picture(layout: TokenLayout, prefix: int, grid: tuple[int, int] | None) -> TokenLayout:
    """Make the prefix a segment of its own, and write down the grid of a whole picture."""
    behind = torch.arange(layout.length, device=layout.device) >= prefix
    segment = layout.segment + behind.to(torch.int32) if prefix else layout.segment
    grids = layout.grids
    if grid is not None and bool(layout.valid.all()):
        grids = tuple({number: grid} for number in segment[:, prefix].tolist())
    return replace(layout, segment=segment, grids=grids, memo={})

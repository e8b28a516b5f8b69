"""Tiles drawn at random, from which the mean over all tiles is estimated.

B batch, T tiles, t drawn tiles of a row
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mm_sparse.layout import Plan


class TileDraw(NamedTuple):
    """Some tiles of a plan, or all of them."""

    plan: Plan
    """Of these tiles alone."""
    index: Tensor | None = None
    """(B, t) int64, their numbers among all tiles; None for all."""
    weight: Tensor | None = None
    """(B,) float32, how many tiles of its row a drawn one stands for; None where each stands for
    itself."""


def draw_tiles(plan: Plan, tiles: int | None, generator: torch.Generator | None) -> TileDraw:
    """Draw `tiles` tiles of each row among those that have a choice; all if there are no more.

    Tiles of padding are not among them.

    The j-th is drawn evenly from the j-th of as many equal stretches of the row's tiles (stratified
    sampling: what a tile has to choose from grows along a causal row). Each tile is expected as
    often as any other, so weighted sums over drawn tiles are unbiased. Nothing waits for a device.

    Args:
        plan: of all tiles.
        tiles: t, None for all.
        generator: of random numbers, torch's own if None.
    """
    if tiles is None or tiles >= plan.tiles.shape[1]:
        return TileDraw(plan)
    choosing = (plan.open_units > 1) & (plan.tile_modality >= 0)  # (B, T)
    device = choosing.device if generator is None else generator.device
    draws = torch.rand(len(choosing), tiles, generator=generator, device=device)
    count = choosing.sum(1, keepdim=True)
    place = torch.arange(tiles, device=choosing.device) + draws.to(choosing.device)
    rank = (place * (count / tiles)).long().minimum(count - 1).clamp(min=0)
    # Tiles with a choice first, in their order.
    order = choosing.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
    index = order.gather(1, rank)
    return TileDraw(plan.of_tiles(index), index, count[:, 0] / tiles)

"""From the list of units of every tile to the list of tiles of every unit, in O(kept units).

B batch, K KV heads, T tiles, U units, L list length, E kept (tile, unit) pairs
"""

import torch
from torch import Tensor


def tile_bounds(tiles: Tensor, span: Tensor, tile_tokens: int) -> Tensor:
    """Range of keys that every query of a tile sees: (B, T, 2) [largest low, smallest high)."""
    batch = tiles.shape[0]
    offset = torch.arange(tile_tokens, device=tiles.device)
    exists = offset < tiles[..., 1:]  # (B, T, tile_tokens)
    token = (tiles[..., :1] + offset).clamp(max=max(span.shape[1] - 1, 0)).long()
    rows = torch.arange(batch, device=tiles.device)[:, None, None]
    low, high = span[rows, token].unbind(-1)
    low = low.masked_fill(~exists, 0).amax(-1)
    high = high.masked_fill(~exists, torch.iinfo(torch.int32).max).amin(-1)
    return torch.stack([low, high], -1)


def transpose_lists(
    tiles: Tensor, units: Tensor, span: Tensor, index: Tensor, count: Tensor,
    tile_tokens: int, unit: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tiles that keep each unit: those that see all of it first, then those that see a part.

    A stable sort (radix on a GPU) keeps tiles ascending, so sums over them run in one order
    whatever the machine does: gradients are the same bit for bit in every run.

    Returns:
        tile ids (B * K * T * L,) int32, of which the first E count, and offsets into them
        (B * K * U * 2 + 1,) int32: the list of unit u of
        batch b and head h is [offsets[2 i], offsets[2 i + 2]), cut at offsets[2 i + 1],
        with i = (b K + h) U + u.
    """
    batch, heads, num_tiles, length = index.shape
    num_units, device = units.shape[1], index.device
    bounds = tile_bounds(tiles, span, tile_tokens)[:, None, :, None]  # (B, 1, T, 1, 2)
    listed = torch.arange(length, device=device) < count[..., None]
    ids = index.masked_fill(~listed, 0).long()
    rows = torch.arange(batch, device=device)[:, None, None, None]
    start, size = units[rows, ids].unbind(-1)
    partial = (size < unit) | (start < bounds[..., 0]) | (start + size > bounds[..., 1])
    group = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    slots = batch * heads * num_units * 2
    # Places behind `count` sort behind every list; nothing here waits for the device.
    slot = ((group * num_units + ids) * 2 + partial).masked_fill(~listed, slots)
    wide = torch.int32 if slots < 2**31 - 1 else torch.int64
    slot, order = slot.flatten().to(wide).sort(stable=True)
    edges = torch.arange(slots + 1, device=device, dtype=wide)
    tile = (order // length % num_tiles).to(torch.int32)
    return tile, torch.searchsorted(slot, edges, out_int32=True)

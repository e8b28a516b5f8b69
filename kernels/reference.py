"""Attention in plain PyTorch: what every kernel of this folder must equal, forward and gradients.

B batch, H query heads, K KV heads, G = H / K, N query tokens, M key tokens, D head dim,
T tiles, U units, L list length
"""

import math

import torch
from torch import Tensor


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor, scale: float | None = None
) -> Tensor:
    """Softmax attention under a mask, in the inputs' precision; a query that sees nothing gets 0.

    Args:
        q: (B, H, N, D).
        k, v: (B, K, M, D), H a multiple of K.
        mask: bool, broadcastable to (B, H, N, M); True is visible.
        scale: factor on the scores, 1 / sqrt(D) if None.
    Returns:
        (B, H, N, D) in the dtype of `v`.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where visible, got {mask.dtype}")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.sum(-1, True)
    weight = (scores - top.masked_fill(top == -math.inf, 0)).exp()
    total = weight.sum(-1, keepdim=True)
    return (weight / total.masked_fill(total == 0, 1)).to(v.dtype) @ v


def dense_mask(
    tiles: Tensor, units: Tensor, span: Tensor, index: Tensor, count: Tensor, keys: int
) -> Tensor:
    """The visible and kept query-key pairs as one mask.

    Args:
        tiles: (B, T, 2) int32, first query token and length of each tile.
        units: (B, U, 2) int32, first key token and length of each unit.
        span: (B, N, 2) int32, the half-open range of keys that each query may see.
        index: (B, K, T, L) int16 or int32, kept unit ids; entries from `count` on are not read.
        count: (B, K, T) int32.
        keys: M.
    Returns:
        (B, K, N, M) bool.
    """
    batch, heads, num_tiles, length = index.shape
    device, num_queries = index.device, span.shape[1]
    num_units = units.shape[1]
    slot = torch.arange(length, device=device)
    ids = torch.where(slot < count[..., None], index, num_units).long()
    kept = torch.zeros(
        batch, heads, num_tiles, num_units + 1, dtype=torch.bool, device=device
    ).scatter_(-1, ids, True)[..., :num_units]
    in_tile = _membership(tiles, num_queries)  # (B, T, N)
    in_unit = _membership(units, keys)  # (B, U, M)
    pairs = torch.einsum("btn,bhtu,bum->bhnm", in_tile.float(), kept.float(), in_unit.float()) > 0
    key = torch.arange(keys, device=device)
    seen = (key >= span[..., :1]) & (key < span[..., 1:])
    return pairs & seen[:, None]


def _membership(table: Tensor, length: int) -> Tensor:
    """(B, P, 2) ranges -> (B, P, length) bool."""
    token = torch.arange(length, device=table.device)
    start, size = table[..., :1], table[..., 1:]
    return (token >= start) & (token < start + size)


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tensor,
    units: Tensor,
    span: Tensor,
    index: Tensor,
    count: Tensor,
    scale: float,
) -> Tensor:
    """`attention_reference` under `dense_mask`; autograd gives the gradients to be equalled."""
    mask = dense_mask(tiles, units, span, index, count, k.shape[2])
    return attention_reference(
        q, k, v, mask=mask.repeat_interleave(q.shape[1] // k.shape[1], dim=1), scale=scale
    )


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

"""Descriptors of the tiles and units of a plan, by a kernel where nobody needs their gradients.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim, T tiles, U units,
S query pools of a tile
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm_sparse._backend import fused, last_contiguous
from mm_sparse.layout import Plan


def tile_descriptors(q: Tensor, plan: Plan, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Means of query pools of tiles (B, H, T, S, D), times `scale`, and which exist (B, T, S)."""
    if _learns(q) or not fused(q, plan):
        tile, exists = tile_query_pools(
            q, plan.tiles, plan.tile_tokens, plan.config.query_pools, plan.regular_tiles
        )
        return (tile if scale == 1 else tile * scale), exists
    from mm_sparse.kernels.triton.pooling import pool

    live = plan.live_query_pools
    q = last_contiguous(q)
    tile = pool(
        q, plan.tiles, plan.tile_tokens, live.shape[2], regular=plan.regular_tiles, scale=scale
    )
    return tile, live


def _learns(x: Tensor) -> bool:
    """Whether somebody needs a gradient of it."""
    return torch.is_grad_enabled() and x.requires_grad


def piece_features(
    x: Tensor, table: Tensor, size: int, parts: int, regular: bool, plan: Plan
) -> Tensor:
    """Mean, largest and smallest of each of the parts of every piece, side by side.

    Args:
        x: (B, heads, tokens, D); no gradient goes back to it.
        table: (B, P, 2), pieces of at most `size` tokens, in runs of ceil(size / parts).
    Returns:
        (B, heads, P, parts, 3 D) in x's dtype; zero where a part has no token.
    """
    x = x.detach()
    if fused(x, plan):
        from mm_sparse.kernels.triton.pooling import pool

        return pool(last_contiguous(x), table, size, parts, extremes=True, regular=regular)
    rows, exists = gather_pieces(x, table, size, regular)
    width = -(-size // parts)
    missing = parts * width - size
    if missing:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
        exists = torch.nn.functional.pad(exists, (0, missing))
    rows = rows.unflatten(3, (parts, width))
    exists = exists.unflatten(2, (parts, width))[:, None, ..., None]
    features = (masked_mean(rows, exists, 4), *masked_extremes(rows, exists, 4))
    return torch.cat(features, -1)


def unit_descriptors(k: Tensor, plan: Plan, extremes: bool) -> tuple[Tensor, ...]:
    """Means of the keys of every unit (B, K, U, D), and their largest and smallest if asked."""
    if _learns(k) or not fused(k, plan):
        keys, present = gather_pieces(k, plan.units, plan.unit, plan.regular)
        present = present[:, None, ..., None]
        mean = masked_mean(keys, present, 3)
        return (mean, *masked_extremes(keys, present, 3)) if extremes else (mean,)
    from mm_sparse.kernels.triton.pooling import pool

    pooled = pool(
        last_contiguous(k), plan.units, plan.unit, extremes=extremes, regular=plan.regular
    )
    return pooled.squeeze(3).chunk(3 if extremes else 1, -1)


def means(q: Tensor, k: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """What `tile_descriptors` and `unit_descriptors` give, by one kernel where it serves."""
    apart = torch.is_grad_enabled() or q.dtype != k.dtype
    if apart or not (fused(q, plan) and fused(k, plan)):
        return None
    from mm_sparse.kernels.triton.pooling import pool_both

    live = plan.live_query_pools
    tile, unit = pool_both(
        last_contiguous(q),
        last_contiguous(k),
        plan.tiles,
        plan.units,
        plan.tile_tokens,
        plan.unit,
        live.shape[2],
        scale,
        regular_tiles=plan.regular_tiles,
        regular=plan.regular,
    )
    return tile, unit, live


def gather_pieces(x: Tensor, table: Tensor, size: int, regular: bool) -> tuple[Tensor, Tensor]:
    """Tokens of each piece side by side.

    Args:
        x: (B, H, N, D).
        table: (B, P, 2), first token and length.
        regular: piece p is exactly the tokens [p * size, (p + 1) * size).
    Returns:
        (B, H, P, size, D), a view if regular, and (B, P, size) bool, which of them exist.
    """
    batch, heads, length, dim = x.shape
    pieces = table.shape[1]
    offset = torch.arange(size, device=x.device)
    exists = offset < table[..., 1:]
    if regular:
        return x.unflatten(2, (pieces, size)), exists
    token = (
        (table[..., :1] + offset).clamp(0, max(length - 1, 0)).long().flatten(1)
    )  # (B, P * size)
    index = token[:, None, :, None].expand(-1, heads, -1, dim)
    return x.gather(2, index).view(batch, heads, pieces, size, dim), exists


def masked_mean(x: Tensor, exists: Tensor, dim: int) -> Tensor:
    """Mean over `dim` of what exists; zero where nothing does. Non-finite values count as zero,
    so that one bad token cannot blur the ranking of every other."""
    weight = exists.to(x.dtype)
    x = torch.nan_to_num(x, 0.0, 0.0, 0.0).masked_fill(~exists, 0)
    return x.sum(dim) / weight.sum(dim).clamp(min=1)


def masked_extremes(x: Tensor, exists: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Largest and smallest over `dim` of what exists; zero where nothing does."""
    x = torch.nan_to_num(x, 0.0, 0.0, 0.0)
    big = torch.finfo(x.dtype).max
    top = x.masked_fill(~exists, -big).amax(dim)
    low = x.masked_fill(~exists, big).amin(dim)
    any_exists = exists.any(dim)
    return top.masked_fill(~any_exists, 0), low.masked_fill(~any_exists, 0)


def tile_query_pools(
    q: Tensor, tiles: Tensor, tile_tokens: int, query_pools: int, regular: bool
) -> tuple[Tensor, Tensor]:
    """Means of `query_pools` runs of tokens of every tile.

    Returns:
        (B, H, T, S, D), and (B, T, S) bool, False where a short tile has no token left.
    """
    rows, exists = gather_pieces(q, tiles, tile_tokens, regular)
    query_pools = min(query_pools, tile_tokens)
    width = -(-tile_tokens // query_pools)
    missing = query_pools * width - tile_tokens
    if missing:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
        exists = torch.nn.functional.pad(exists, (0, missing))
    rows = rows.unflatten(3, (query_pools, width))  # (B, H, T, S, width, D)
    exists = exists.unflatten(2, (query_pools, width))
    return masked_mean(rows, exists[:, None, ..., None], 4), exists.any(-1)

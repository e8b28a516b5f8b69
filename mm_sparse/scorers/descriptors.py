"""Descriptors of the tiles and units of a plan, by a kernel where nobody needs their gradients.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim, T tiles, U units,
S sub-pools of a tile
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm_sparse.kernels.ops import DTYPES, interpreted
from mm_sparse.layout.plan import Plan
from mm_sparse.scorers.pooling import gather_pieces, masked_extremes, masked_mean, tile_subpools

# Rows of a tile (sub-pools times query heads of a group) that the kernel takes.
MOST_ROWS = 128


def fused(x: Tensor, plan: Plan) -> bool:
    """Whether kernels score and select: on a GPU, or where a config asks for the interpreter."""
    if plan.config.backend == "torch" or x.dtype not in DTYPES or not x.numel():
        return False
    if x.device.type != "cuda" and not (plan.config.backend == "triton" and interpreted()):
        return False
    return plan.group * min(plan.config.subpools, plan.tile_tokens) <= MOST_ROWS


def tile_descriptors(q: Tensor, plan: Plan, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Means of sub-pools of tiles (B, H, T, S, D), times `scale`, and which exist (B, T, S)."""
    if torch.is_grad_enabled() or not fused(q, plan):
        tile, exists = tile_subpools(
            q, plan.tiles, plan.tile_tokens, plan.config.subpools, plan.regular_tiles
        )
        return (tile if scale == 1 else tile * scale), exists
    from mm_sparse.kernels.triton.pooling import pool

    live = plan.live_subpools
    q = last_contiguous(q)
    tile = pool(
        q, plan.tiles, plan.tile_tokens, live.shape[2], regular=plan.regular_tiles, scale=scale
    )
    return tile, live


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
    found = (masked_mean(rows, exists, 4), *masked_extremes(rows, exists, 4))
    return torch.cat(found, -1)


def unit_descriptors(k: Tensor, plan: Plan, extremes: bool) -> tuple[Tensor, ...]:
    """Means of the keys of every unit (B, K, U, D), and their largest and smallest if asked."""
    if torch.is_grad_enabled() or not fused(k, plan):
        keys, present = gather_pieces(k, plan.units, plan.unit, plan.regular)
        present = present[:, None, ..., None]
        mean = masked_mean(keys, present, 3)
        return (mean, *masked_extremes(keys, present, 3)) if extremes else (mean,)
    from mm_sparse.kernels.triton.pooling import pool

    found = pool(last_contiguous(k), plan.units, plan.unit, extremes=extremes, regular=plan.regular)
    return found.squeeze(3).chunk(3 if extremes else 1, -1)


def means(q: Tensor, k: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """What `tile_descriptors` and `unit_descriptors` give, by one kernel where it serves."""
    apart = torch.is_grad_enabled() or plan.descriptors is not None or q.dtype != k.dtype
    if apart or not (fused(q, plan) and fused(k, plan)):
        return None
    from mm_sparse.kernels.triton.pooling import pool_both

    live = plan.live_subpools
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


def last_contiguous(x: Tensor) -> Tensor:
    """As kernels read it: a copy only if the head dim is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()

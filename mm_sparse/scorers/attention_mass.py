"""True attention mass of every unit: what scorers learn, and what an oracle ranks by.

B batch, H query heads, K KV heads, G = H / K, N query tokens, M key tokens, D head dim,
T tiles, U units
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mm_sparse._backend import fused, last_contiguous
from mm_sparse._checks import check_heads
from mm_sparse.layout import Plan
from mm_sparse.scorers.base import Scorer
from mm_sparse.scorers.descriptors import gather_pieces

# Elements of one block of scores; more are computed block by block.
BLOCK_ELEMENTS = 1 << 24


def unit_mass(q: Tensor, k: Tensor, plan: Plan, scale: float | None = None) -> Tensor:
    """True softmax mass of every unit, `config.reduce` of a tile's rows: what scorers learn.

    Computed some tiles at a time; nothing of size N x M is stored.

    Returns:
        (B, K, T, U) float32; zero for a tile without a query that sees a key.
    """
    check_heads(q, k, k, plan.layout)
    if q.shape[1] != plan.group * k.shape[1]:
        raise ValueError(
            f"q must have {plan.group} heads for each of k's as the plan has, "
            f"got {q.shape[1]} and {k.shape[1]}"
        )
    if q.shape[2] != plan.num_queries:
        raise ValueError(f"q must have {plan.num_queries} tokens as the plan has, got {q.shape[2]}")
    batch, heads, _, dim = q.shape
    kv_heads = k.shape[1]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    if fused(q, plan) and k.numel():
        return _unit_mass_fused(q.detach(), k.detach(), plan, scale)
    rows, exists = gather_pieces(q, plan.tiles, plan.tile_tokens, plan.regular_tiles)
    span, _ = gather_pieces(plan.span[:, None], plan.tiles, plan.tile_tokens, plan.regular_tiles)
    keys, present = gather_pieces(k, plan.units, plan.unit, plan.regular)
    offset = torch.arange(plan.unit, device=q.device)
    position = (plan.units[..., :1] + offset).flatten(1)  # (B, U * unit)
    num_units = plan.units.shape[1]
    columns = keys.flatten(2, 3).transpose(-1, -2)[:, :, None]  # (B, K, 1, D, U * unit)
    rows = rows.unflatten(1, (kv_heads, -1))  # (B, K, G, T, tokens, D)
    step = max(1, BLOCK_ELEMENTS // max(1, batch * heads * plan.tile_tokens * columns.shape[-1]))
    blocks = []
    for at in range(0, rows.shape[3], step):
        part = slice(at, at + step)
        low, high = span[:, 0, part].unbind(-1)  # (B, t, tokens)
        seen = (position[:, None, None] >= low[..., None]) & (
            position[:, None, None] < high[..., None]
        )
        seen &= present.flatten(1)[:, None, None]
        scores = (rows[:, :, :, part].flatten(3, 4) @ columns).float() * scale
        scores = scores.unflatten(3, seen.shape[1:3]).masked_fill(~seen[:, None, None], -math.inf)
        weight = torch.nan_to_num(scores.softmax(-1), 0.0)
        live = (seen.any(-1) & exists[:, part]).float()  # (B, t, tokens)
        mass = weight.unflatten(-1, (num_units, plan.unit)).sum(-1) * live[:, None, None, ..., None]
        if plan.config.reduce == "max":
            blocks.append(mass.amax((2, 4)))
            continue
        members = (live.sum(-1) * plan.group).clamp(min=1)
        blocks.append(mass.sum((2, 4)) / members[:, None, :, None])
    return torch.cat(blocks, 2) if blocks else q.new_zeros(batch, kv_heads, 0, num_units).float()


def _unit_mass_fused(q: Tensor, k: Tensor, plan: Plan, scale: float) -> Tensor:
    from mm_sparse.kernels.triton.attention_mass import unit_mass as kernel

    q, k = last_contiguous(q), last_contiguous(k)
    largest = plan.config.reduce == "max"
    args = (plan.tiles, plan.units, plan.span, scale, plan.tile_tokens, plan.unit, largest)
    mass = kernel(q, k, *args)
    return mass if largest else mass / (plan.members * plan.group).clamp(min=1)[:, None, :, None]


class OracleScorer(Scorer):
    """The log of the true attention mass: an upper reference, which costs a dense pass.

    s(t, u) = log of the mean over the tile's rows of the softmax mass on unit u (`unit_mass`).
    """

    def score(self, q: Tensor, k: Tensor, plan: Plan, scale: float) -> Tensor:
        return unit_mass(q, k, plan, scale).clamp(min=1e-20).log()

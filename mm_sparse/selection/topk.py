"""The lists of units that scores choose under a plan's budgets: PyTorch's, and the kernel's.

B batch, K KV heads, T tiles, U units, L list length, C units that compete for a tile
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm_sparse._backend import fused
from mm_sparse.kernels.sizes import index_dtype
from mm_sparse.layout import Plan
from mm_sparse.selection.sampling import list_lengths

if TYPE_CHECKING:
    from mm_sparse.kernels.triton.topk import SampledLists
    from mm_sparse.selection.scores import Runs

# Units of a row that the kernel's registers hold and one behind them, which floors need.
MOST_UNITS = 16385


def fits_registers(values: Tensor, plan: Plan) -> bool:
    """Whether the kernel that holds a row of units in registers serves."""
    return plan.config.top_p is None and fused(values, plan) and values.shape[-1] <= MOST_UNITS


def topk_lists(values: Tensor, plan: Plan, runs: Runs | None = None) -> tuple[Tensor, Tensor]:
    """Index (B, K, T, L) and count (B, K, T) of the best units of every tile.

    Args:
        values: (B, K, T, U), or (B, K, T, C) of the units of `runs`, which alone compete.
    """
    batch, heads, num_tiles, _ = values.shape
    num_units, width = plan.units.shape[1], plan.max_kept
    if not width or not num_tiles or not batch:
        index = values.new_full((batch, heads, num_tiles, 1), -1, dtype=index_dtype(num_units))
        return index, index.new_zeros(batch, heads, num_tiles, dtype=torch.int32)
    long = plan.config.top_p is None and fused(values, plan) and not plan.config.floors()
    if long or fits_registers(values, plan):
        return topk_kernel(values, plan, runs)[:2]
    big = torch.finfo(torch.float32).max
    finite = torch.nan_to_num(values.float(), nan=-big, posinf=big, neginf=-big)
    visible = plan.visible[:, None]
    if runs is not None:
        finite = runs.spread(finite, num_units)
        visible = visible & runs.among(num_units)
    ranked = finite.masked_fill(~visible, -math.inf)
    first = plan.always[:, None] | _floors(ranked, plan)
    ranked = ranked.masked_fill(first, math.inf)
    top, ids = ranked.topk(width, -1)
    size = plan.units[..., 1].long()[:, None, None].expand(-1, heads, num_tiles, -1).gather(-1, ids)
    before = size.cumsum(-1) - size
    kept = before + (size + 1) // 2 <= plan.head_budget[..., None]
    if plan.config.top_p is not None:
        kept = _mass_before(finite, ids, plan) < plan.config.top_p
    kept[..., 0] = True
    kept |= top == math.inf
    kept &= top > -math.inf
    index = torch.where(kept, ids, num_units).sort(-1).values
    index = index.masked_fill(index == num_units, -1).to(index_dtype(num_units))
    return index, kept.sum(-1, dtype=torch.int32)


def topk_kernel(
    values: Tensor, plan: Plan, runs: Runs | None = None
) -> tuple[Tensor, Tensor, SampledLists | None]:
    """The same by a kernel, ties to the lowest id, and with it what `sampling.draw` draws."""
    from mm_sparse.kernels.triton.topk import SamplingBudget, topk_blocks

    best, drawing = plan.without_sample, None
    if best is not plan:
        width, whole = list_lengths(best.max_kept, plan)
        drawing = SamplingBudget(plan.head_budget, width, whole)
    return topk_blocks(
        values.float(),
        plan.window_span,
        plan.sink_units,
        plan.tile_span,
        plan.units,
        best.head_budget,
        best.max_kept,
        unit_kind=plan.unit_modality,
        floors=best.floors,
        unit=plan.unit,
        lead=plan.unit_offset,
        num_keys=plan.layout.length,
        drawing=drawing,
        runs=None if runs is None else (runs.index, runs.count, runs.size),
    )


def _mass_before(finite: Tensor, ids: Tensor, plan: Plan) -> Tensor:
    """Predicted share of attention of what ranks before each entry."""
    share = finite.masked_fill(~plan.visible[:, None], -math.inf).softmax(-1).nan_to_num(0.0)
    share = share.gather(-1, ids)
    # Rounding must not make a mass of 1 stop before the last unit.
    return (share.cumsum(-1) - share) * (1 - 1e-6)


def _floors(ranked: Tensor, plan: Plan) -> Tensor:
    """Best units of each modality up to its least share of the budget: (B, K, T, U) bool."""
    kept = torch.zeros_like(ranked, dtype=torch.bool)
    for kind, share in plan.config.floors().items():
        own = (plan.unit_modality == int(kind))[:, None, None]
        top, ids = ranked.masked_fill(~own, -math.inf).sort(-1, descending=True)
        size = plan.units[..., 1].long()[:, None, None].expand_as(ids).gather(-1, ids)
        before = size.cumsum(-1) - size
        inside = (before < plan.head_budget[..., None] * share) & (top > -math.inf)
        kept |= torch.zeros_like(kept).scatter_(-1, ids, inside)
    return kept

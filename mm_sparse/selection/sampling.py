"""A sample of the units that are not among the best, which stands for all of them.

Softmax over the best units alone is biased where attention is diffuse: what is left out adds up.
Here a part of the budget goes to every n-th of the other units, and each key of it counts as often
as there are such keys for one in the sample. That estimates sums over all keys without bias, as
sampled attention does (HyperAttention, Han et al., 2023; MagicPIG, Chen et al., 2024).

B batch, H query heads, K KV heads, N query tokens, T tiles, U units, L list length
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mm_sparse.layout import Plan
from mm_sparse.selection.block_lists import lists_to_mask, mask_to_lists

# Multiples of the golden ratio and of its kin in three dimensions, in 65536ths: where a tile and a
# head start to count.
STEP_TILE, STEP_HEAD, TURN = 40503, 53813, 1 << 16


@dataclass(frozen=True, eq=False)
class Sample:
    """The two parts of a selection; together they are its lists."""

    best_index: Tensor
    """(B, K, T, L) int16 or int32, units kept for their scores."""
    best_count: Tensor
    """(B, K, T) int32."""
    index: Tensor
    """(B, K, T, L) int16 or int32, units that stand for what is not kept."""
    count: Tensor
    """(B, K, T) int32, 0 where nothing is left to stand for, or no budget."""
    weight: Tensor
    """(B, K, T) float32: log of how many keys one sampled key stands for."""


def sample_rest(index: Tensor, count: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Sample]:
    """Lists of all that is kept, and their parts, from the lists of the best.

    Of the other visible units of a tile so many are taken as the budget still holds, evenly spaced.
    Where the spacing starts follows from the numbers of tile and head: nothing is random.
    """
    best = lists_to_mask(index, count, plan.units.shape[1])
    size = plan.units[:, None, None, :, 1]
    others = plan.visible[:, None] & ~best
    left = plan.head_budget - (best * size).sum(-1)
    have, keys = others.sum(-1), (others * size).sum(-1)
    take = ((left + plan.unit // 2) // plan.unit).clamp(min=0).minimum(have)
    # Short units must not leave anything out where the budget holds all.
    take = torch.where(left < keys, take, have)
    tile = torch.arange(index.shape[2], device=index.device)
    head = torch.arange(index.shape[1], device=index.device)[:, None]
    start = (tile * STEP_TILE + head * STEP_HEAD) % TURN * have // TURN
    rank = others.cumsum(-1) - 1 + start[..., None]
    per = have.clamp(min=1)[..., None]
    steps = (rank + 1) * take[..., None] // per > rank * take[..., None] // per
    chosen = others & steps
    width, both = list_lengths(index.shape[-1], plan)
    drawn, drawn_count = mask_to_lists(chosen, width)
    taken = (chosen * size).sum(-1)
    weight = (keys.float() / taken.clamp(min=1)).clamp(min=1).log()
    whole = mask_to_lists(best | chosen, both)
    return *whole, Sample(index, count, drawn, drawn_count, weight)


def list_lengths(best: int, plan: Plan) -> tuple[int, int]:
    """Of the sample, and of the sample and lists of the best so long."""
    width = max(plan.max_kept, 1)
    return width, min(width + best, plan.units.shape[1])

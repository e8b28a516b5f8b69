"""Divergence of predicted from true attention.

B batch, K KV heads, T tiles, U units
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mm_sparse.layout import Plan
from mm_sparse.selection import Scores

TINY = 1e-6


class TileDivergence(NamedTuple):
    """KL(true || predicted) of each tile over the units that are a matter of choice."""

    divergence: Tensor
    """(..., B, K, T), zero for a tile without a choice."""
    mass: Tensor
    """(..., B, K, T), true mass on those units."""
    chosen: Tensor
    """(..., B, K, T) bool: the tile has a choice, and mass on it."""


def scorer_loss(scores: Scores, mass: Tensor) -> Tensor:
    """`attention_kl` of what a scorer predicted, every tile counting alike."""
    return attention_kl(scores.values, mass, scores.plan)


def attention_kl(values: Tensor, mass: Tensor, plan: Plan, *, weighted: bool = False) -> Tensor:
    """KL(true || predicted) over the units that are a matter of choice, mean over heads and tiles.

    A tile chooses among units that it sees and that are not kept anyway (`plan.always`): mass on
    sinks and window would drown the rest. Both distributions are renormalised over those.

    Args:
        values: (..., B, K, T, U) scores.
        mass: the same shape, true share of attention, as `mm_sparse.unit_mass` gives it.
        weighted: count a tile by its mass on those units.
    """
    loss, total, chosen = kl_of_tiles(values, mass, plan)
    if weighted:
        return mean_of_tiles(loss * total, plan)
    return loss.sum() / chosen.sum().clamp(min=1)


def mean_of_tiles(values: Tensor, plan: Plan) -> Tensor:
    """Mean of (..., B, K, T) over all but tiles of padding, whose values are zero."""
    real = (plan.tile_modality >= 0)[:, None].expand(values.shape)
    return values.sum() / real.sum().clamp(min=1)


def kl_of_tiles(values: Tensor, mass: Tensor, plan: Plan) -> TileDivergence:
    """What `attention_kl` is the mean of, tile by tile.

    Args:
        values, mass: (..., B, K, T, U).
    """
    if mass.shape != values.shape:
        raise ValueError(
            f"mass must be {tuple(values.shape)} as the scores are, got {tuple(mass.shape)}"
        )
    open_units = (plan.visible & ~plan.always)[:, None]
    mass = mass.detach().float() * open_units
    total = mass.sum(-1, keepdim=True)
    # Padding sees keys, too, and teaches nothing.
    real = (plan.tile_modality >= 0)[:, None]
    chosen = (total[..., 0] > TINY) & (open_units.sum(-1) > 1) & real
    target = mass / total.clamp(min=TINY)
    # A large negative number, not -inf: no gradient may become NaN.
    predicted = values.float().masked_fill(~open_units, -1e9).log_softmax(-1)
    gap = torch.special.xlogy(target, target) - target * predicted
    loss = gap.masked_fill(~open_units, 0).sum(-1) * chosen
    return TileDivergence(loss, total[..., 0], chosen)

"""A differentiable stand-in for top-k selection."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_sparse.distillation.divergence import mean_of_tiles
from mm_sparse.layout import Plan

TINY = 1e-6


def dropped_mass(
    values: Tensor, mass: Tensor, plan: Plan, temperature: float, budget: Tensor | None = None
) -> Tensor:
    """Share of attention that a soft choice of the best units drops, mean over heads and tiles.

    Tiles of padding do not count.

    Args:
        values, mass: (..., B, K, T, U), as for `attention_kl`.
        temperature: of `soft_topk`.
        budget: (..., B, K or 1, T) tokens, if not the plan's for the best.
    """
    open_units = (plan.visible & ~plan.always)[:, None]
    mass = mass.detach().float() * open_units
    choice = (open_units[:, 0].sum(-1) > 1) & (plan.tile_modality >= 0)
    kept = soft_topk(values, plan, temperature, budget)
    dropped = (mass * (1 - kept)).sum(-1) * choice[:, None]
    return mean_of_tiles(dropped, plan)


def soft_topk(
    values: Tensor, plan: Plan, temperature: float, budget: Tensor | None = None
) -> Tensor:
    """How much of each open unit is kept, (..., B, K, T, U) in [0, 1].

    A unit is kept by the sigmoid of its distance to the score of the last unit that the budget of
    the best holds, over `temperature`. That threshold moves with the scores such that the number of
    kept units stays: what counts is who is above it (as in differentiable top-k operators).

    Args:
        temperature: in units of the scores, which are logarithms of shares.
        budget: as for `dropped_mass`.
    """
    open_units = (plan.visible & ~plan.always)[:, None]
    values = values.float().masked_fill(~open_units, -1e9)
    always = (plan.always * plan.units[:, None, :, 1]).sum(-1)
    budget = plan.without_sample.head_budget if budget is None else budget
    left = (budget - always[:, None]).clamp(min=0) // plan.unit  # units
    most = open_units[:, 0].sum(-1) - 1
    left = left.minimum(most[:, None]).clamp(min=1)[..., None].expand(*values.shape[:-1], 1)
    with torch.no_grad():
        ranked = values.sort(-1, descending=True).values
        behind = left.clamp(max=values.shape[-1] - 1)
        threshold = (ranked.gather(-1, left - 1) + ranked.gather(-1, behind)) / 2
        kept = torch.sigmoid((values - threshold) / temperature)
        slope = kept * (1 - kept)
        slope = slope / slope.sum(-1, keepdim=True).clamp(min=TINY)
    drift = (slope * values).sum(-1, keepdim=True)
    return torch.sigmoid((values - threshold - (drift - drift.detach())) / temperature)

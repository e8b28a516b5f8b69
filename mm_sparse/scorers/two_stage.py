"""Ranking in two steps, for sequences so long that ranking every unit would take most of the time.

Runs of adjacent units are ranked first, each as one unit; then the units of the best runs one by
one. Work for each tile is a fraction of the units and a constant, not all units: from coarse to
fine as in Quest's pages (Tang et al., 2024) and in the two levels of NSA (Yuan et al., 2025).

B batch, H query heads, K KV heads, T tiles, U units, S query pools of a tile, F width of a
descriptor, R chosen runs of a tile, C = R x units of a run
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mm_sparse._backend import fused
from mm_sparse.layout import Plan
from mm_sparse.scorers.block_scores import Descriptors, block_scores, described_units
from mm_sparse.selection import Runs, topk_lists


class Ranked(NamedTuple):
    """Scores of the units of some runs."""

    values: Tensor
    """(B, K, T, C); what stands for no unit may hold anything."""
    runs: Runs


def two_stage_scores(described: Descriptors, plan: Plan) -> Ranked:
    """`shares.share_of_units`, of the units of the best runs alone.

    Shares are of what a query pool gives to those units.
    """
    tile, _, exists, bias, parts = described
    unit = described_units(described, plan)
    described = described._replace(unit=unit)
    over = plan_of_runs(plan)
    whole = block_scores(Descriptors(tile, describe_runs(unit, plan), exists, bias), over)
    runs = Runs(*topk_lists(whole, over), plan.config.coarse_factor)
    del whole
    if fused(tile, plan):
        from mm_sparse.kernels.triton.two_stage_scores import share_of_runs

        values = share_of_runs(
            tile,
            unit.to(tile.dtype),
            exists,
            plan.tiles,
            plan.tile_span,
            plan.units,
            plan.unit,
            (runs.index, runs.count, runs.size),
            largest=plan.config.reduce == "max",
            bias=bias,
            tile_kind=plan.tile_modality,
            unit_kind=plan.unit_modality,
            query_offset=plan.query_offset,
            lead=plan.unit_offset,
            num_keys=plan.layout.length,
            parts=None if parts is None else parts.to(tile.dtype),
        )
        return Ranked(values, runs)
    num_units = plan.units.shape[1]
    values = block_scores(described, plan, runs.among(num_units))
    ids = runs.units(num_units).clamp(max=max(num_units - 1, 0))
    return Ranked(values.gather(-1, ids), runs)


def describe_runs(unit: Tensor, plan: Plan) -> Tensor:
    """Means over the keys of runs of units: (B, K, U, F) -> (B, K, ceil(U / size), F)."""
    size = plan.config.coarse_factor
    missing = -unit.shape[2] % size
    if plan.regular and not missing:
        return unit.unflatten(2, (-1, size)).mean(3)
    weight = torch.nn.functional.pad(plan.units[..., 1], (0, missing)).unflatten(1, (-1, size))
    weight = weight[:, None, ..., None].float()
    unit = torch.nn.functional.pad(unit, (0, 0, 0, missing)).unflatten(2, (-1, size))
    return ((unit * weight).sum(3) / weight.sum(3).clamp(min=1)).to(unit.dtype)


def plan_of_runs(plan: Plan) -> Plan:
    """The same tiles, with runs of units as units, and the budget for candidates.

    A run has the modality of its first unit, and reaches from its first key to its last.
    """
    return plan.memoize(("runs", plan.config), lambda: _plan_of_runs(plan))


def _plan_of_runs(plan: Plan) -> Plan:
    size = plan.config.coarse_factor
    missing = -plan.units.shape[1] % size
    units = torch.nn.functional.pad(plan.units, (0, 0, 0, missing)).unflatten(1, (-1, size))
    first, end = units[:, :, 0, 0], units.sum(-1).amax(2)
    kind = torch.nn.functional.pad(plan.unit_modality, (0, missing), value=-1)
    over = replace(
        plan,
        config=plan.config.for_candidates(),
        units=torch.stack([first, (end - first).clamp(min=0)], -1).to(torch.int32),
        unit_modality=kind.unflatten(1, (-1, size))[..., 0].contiguous(),
        units_per_run=size,
    )
    over.memo["modalities"] = plan.modalities
    # To look at every token again would be slow.
    sinks = torch.nn.functional.pad(plan.sink_units, (0, missing)).unflatten(1, (-1, size))
    over.memo["sinks", plan.config.sinks] = sinks.any(-1)
    return over

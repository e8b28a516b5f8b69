"""The share of attention that query pools of a tile give to every unit, from descriptors of both.

B batch, H query heads, K KV heads, G = H / K, T tiles, U units, S query pools of a tile,
F width of a descriptor
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mm_sparse._backend import fused
from mm_sparse.kernels.paged.pages import Pages, place_units
from mm_sparse.layout import Plan, part_sizes
from mm_sparse.modality import Modality

# Elements of one block of query pool logits; more are computed block by block.
BLOCK_ELEMENTS = 1 << 26
# The same where nothing is differentiated, in place: a block stays in the cache of a CPU.
CACHED_ELEMENTS = 1 << 19
# Logits of a part that lie so far above the sum over whole units count as this: exp stays finite.
HIGHEST = 80.0
DISTANCE_BUCKETS = 24


class Descriptors(NamedTuple):
    """Of tiles and units, whose products are scores; see `block_scores`."""

    tile: Tensor
    unit: Tensor | None
    exists: Tensor
    bias: Tensor | None = None
    parts: Tensor | None = None


def described_units(described: Descriptors, plan: Plan) -> Tensor:
    """(B, K, U, F), of whole units.

    Raises:
        ValueError: neither units nor parts are described.
    """
    if described.unit is not None:
        return described.unit
    if described.parts is None:
        raise ValueError("described must have units or parts, got neither")
    return mean_of_parts(described.parts, plan)


def mean_of_parts(parts: Tensor, plan: Plan) -> Tensor:
    """(B, K, U, C, F) -> (B, K, U, F): each part weighs as many keys as it has."""
    if plan.regular:
        return parts.mean(3)
    size = part_sizes(plan.units, plan.unit, parts.shape[3])
    weight = size.to(parts.dtype)[:, None, ..., None]
    return (parts * weight).sum(3) / weight.sum(3).clamp(min=1)


def pair_biases(table: Tensor, plan: Plan) -> Tensor:
    """(B, K, T, U) from (K, kinds, kinds, buckets) by distance in powers of two."""
    distance = plan.distance
    bucket = (distance.abs() + 1).float().log2().long().clamp(max=DISTANCE_BUCKETS // 2 - 1)
    bucket = torch.where(distance < 0, bucket + DISTANCE_BUCKETS // 2, bucket)
    kinds = len(Modality)
    pair = plan.tile_modality.long().clamp(min=0)[:, :, None] * kinds
    pair = pair + plan.unit_modality.long().clamp(min=0)[:, None]
    place = (pair * DISTANCE_BUCKETS + bucket).flatten(1)[:, None]  # (B, 1, T * U)
    heads = len(table)
    # Gathered, not indexed: millions of places share a few hundred entries, whose gradients
    # indexing would add up one after the other.
    flat = table.flatten(1).expand(len(place), -1, -1)
    return flat.gather(2, place.expand(-1, heads, -1)).unflatten(2, distance.shape[1:])


def block_scores(
    described: Descriptors, plan: Plan, competes: Tensor | None = None, pages: Pages | None = None
) -> Tensor:
    """Log of the share that the query pools of a tile give to every unit, as `config.reduce` says.

    Args:
        described: tile (B, H, T, S, F), scale included, unit (B, K, U, F) and exists (B, T, S).
            unit: None for the mean of the parts (`mean_of_parts`).
            bias: (K, kinds, kinds, buckets) by modality of tile and unit and by distance, added.
            parts: (B, K, U, C, F) of C runs of keys of each unit, whose shares add up to the
            unit's; the sum that shares are of stays that of the whole units, which is cheaper.
        competes: (B, K, T, U) bool, units that shares are of, all that are visible if None.
        pages: where units are described that all rows keep together: `unit` is (1, K, all in
            memory, F), and `parts` alike.
    Returns:
        (B, K, T, U) float32; kernels may count a share under 2^-126 as nothing, -1e30.
    """
    tile, unit, exists, bias, parts = described
    if competes is None and not torch.is_grad_enabled() and fused(tile, plan):
        from mm_sparse.kernels.triton.block_scores import block_scores as kernel, has_few_rows

        if parts is not None and has_few_rows(tile, parts.shape[1]):
            unit = None
        else:
            unit = described_units(described, plan).to(tile.dtype)
        return kernel(
            tile,
            unit,
            exists,
            plan.tiles,
            plan.tile_span,
            plan.units,
            plan.unit,
            largest=plan.config.reduce == "max",
            bias=bias,
            tile_kind=plan.tile_modality,
            unit_kind=plan.unit_modality,
            query_offset=plan.query_offset,
            lead=plan.unit_offset,
            num_keys=plan.layout.length,
            parts=None if parts is None else parts.to(tile.dtype),
            pages=pages,
        )
    if pages is not None:
        return block_scores(_out_of_pages(described, plan, pages), plan, competes)
    if competes is None and not torch.is_grad_enabled() and tile.device.type == "cpu":
        values = _shares_in_place(described, plan)
        return values if bias is None else values + pair_biases(bias, plan)
    unit = described_units(described, plan)
    batch, heads, num_tiles, query_pools, width = tile.shape
    kv_heads, num_units = unit.shape[1], unit.shape[2]
    size = plan.units[..., 1].clamp(min=1)
    size_bias = (size.float() / plan.unit).log()[:, None, None, None, None]  # (B, 1, 1, 1, 1, U)
    tile = tile.view(batch, kv_heads, plan.group, num_tiles, query_pools, width)
    unit = unit.to(tile.dtype).transpose(-1, -2)  # (B, K, F, U)
    members = (exists.sum(-1) * plan.group).clamp(min=1).float().log()  # (B, T)
    count = 1 if parts is None else parts.shape[3]
    step = max(1, BLOCK_ELEMENTS // max(1, batch * heads * query_pools * num_units * count))
    blocks = []
    for at in range(0, num_tiles, step):
        part = slice(at, at + step)
        rows = tile[:, :, :, part].flatten(2, 4)  # (B, K, G * t * S, F)
        hidden = ~plan.visible[:, None, None, part, None]
        if competes is not None:
            hidden = hidden | ~competes[:, :, None, part, None]
        logits = (rows @ unit).float().unflatten(2, (plan.group, -1, query_pools))
        logits = (logits + size_bias).masked_fill(hidden, -math.inf)
        total = logits.logsumexp(-1, keepdim=True).clamp(min=-1e30)
        if parts is not None:
            logits = _sum_of_parts(rows, parts, plan).unflatten(2, (plan.group, -1, query_pools))
            logits = logits.masked_fill(hidden, -math.inf)
        logits = logits - total
        logits = logits.masked_fill(~exists[:, None, None, part, :, None], -math.inf)
        # -inf everywhere would give NaN gradients; such entries are never selected.
        logits = logits.clamp(min=-1e30)
        if plan.config.reduce == "max":
            blocks.append(logits.amax((2, 4)))
        else:
            blocks.append(logits.logsumexp((2, 4)) - members[:, None, part, None])
    empty = tile.new_zeros(batch, kv_heads, 0, num_units).float()
    values = torch.cat(blocks, 2) if blocks else empty
    return values if bias is None else values + pair_biases(bias, plan)


def _out_of_pages(described: Descriptors, plan: Plan, pages: Pages) -> Descriptors:
    """The same with descriptors of the plan's units copied in their order."""
    number = torch.arange(plan.units.shape[1], device=plan.units.device)
    # Of pages behind the end of a sequence, of which nobody sees a unit, any will do.
    pages = pages._replace(table=pages.table.clamp(min=0))
    place = place_units(number.expand(len(plan.units), -1), pages)

    def copied(x: Tensor) -> Tensor:
        return x[0][:, place.clamp(max=x.shape[2] - 1)].transpose(0, 1)

    parts = None if described.parts is None else copied(described.parts)
    unit = None if described.unit is None else copied(described.unit)
    return described._replace(unit=unit, parts=parts)


def _shares_in_place(described: Descriptors, plan: Plan) -> Tensor:
    """`block_scores` without bias, in shares instead of their logarithms: few passes over memory.

    Units behind the last one that a block of tiles sees are left out: half of them, if causal.
    """
    tile, _, exists, _, parts = described
    unit = described_units(described, plan)
    batch, heads, num_tiles, query_pools, width = tile.shape
    kv_heads, num_units = unit.shape[1], unit.shape[2]
    rows = tile.view(batch, kv_heads, plan.group, num_tiles, query_pools, width)
    unit = unit.to(tile.dtype).transpose(-1, -2)  # (B, K, F, U)
    size_bias = (plan.units[..., 1].clamp(min=1).float() / plan.unit).log()[:, None, None]
    members = (exists.sum(-1) * plan.group).clamp(min=1).float().log()  # (B, T)
    weights: list[Tensor] = []
    if parts is not None:
        count = parts.shape[3]
        width_of_part = -(-plan.unit // count)
        sizes = part_sizes(plan.units, plan.unit, count).float() / (width_of_part * count)
        weights = [x[:, None, None] for x in sizes.unbind(-1)]  # (B, 1, 1, U) each
    hidden, missing = ~plan.visible, ~exists
    places = torch.arange(1, num_units + 1, device=tile.device)
    ends = (plan.visible * places).amax((0, 2)).tolist() if num_units else [0] * num_tiles
    values = tile.new_full((batch, kv_heads, num_tiles, num_units), -1e30, dtype=torch.float32)
    step = max(1, CACHED_ELEMENTS // max(1, batch * heads * query_pools * num_units))
    for at in range(0, num_tiles, step):
        part, end = slice(at, at + step), max(ends[at : at + step])
        if not end:
            continue
        some = rows[:, :, :, part].flatten(2, 4)  # (B, K, G * t * S, F)
        shape = (plan.group, exists[:, part].shape[1], query_pools)
        unseen = hidden[:, None, None, part, None, :end]
        logits = (some @ unit[..., :end]).float().add_(size_bias[..., :end])
        logits.unflatten(2, shape).masked_fill_(unseen, -math.inf)
        total = logits.logsumexp(-1, keepdim=True).clamp_(min=-1e30)
        if parts is None:
            share = logits.sub_(total).exp_()
        else:
            share = torch.zeros_like(logits)
            for own, weight in zip(parts.unbind(3), weights, strict=True):
                products = some @ own[:, :, :end].to(some.dtype).transpose(-1, -2)
                products = products.float().sub_(total).clamp_(max=HIGHEST).exp_()
                share.addcmul_(products, weight[..., :end])
        share = share.unflatten(2, shape)
        share.masked_fill_(unseen, 0)
        share.masked_fill_(missing[:, None, None, part, :, None], 0)
        if plan.config.reduce == "max":
            found = share.amax((2, 4)).log_()
        else:
            found = share.sum((2, 4)).log_().sub_(members[:, None, part, None])
        values[:, :, part, :end] = found.clamp_(min=-1e30)
    return values


def _sum_of_parts(rows: Tensor, parts: Tensor, plan: Plan) -> Tensor:
    """(B, K, rows, U): log of the mean over its parts of what a row gives to a unit."""
    count = parts.shape[3]
    weight = part_sizes(plan.units, plan.unit, count).float() / -(-plan.unit // count)  # (B, U, C)
    bias = weight.log().flatten(1)[:, None, None]  # (B, 1, 1, U * C), -inf if empty
    products = rows @ parts.flatten(2, 3).to(rows.dtype).transpose(-1, -2)
    products = (products.float() + bias).clamp(min=-1e30).unflatten(-1, (-1, count))
    return products.logsumexp(-1) - math.log(count)

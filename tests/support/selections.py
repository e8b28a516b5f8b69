"""Selections from random scores.

B batch, K KV heads, T tiles, U units
"""

import math

import torch
from torch import Tensor, nn

import mm_sparse as mms
from mm_sparse import AttentionCall, Scores, Selection, SparseConfig, TokenLayout, attention_layers
from tests.support.layouts import Row

Batch = tuple[list[Row], str]


def random_scores(
    layout: TokenLayout, config: SparseConfig, kv_heads: int = 1, group: int = 1, seed: int = 0
) -> Scores:
    """Different values for all units, so that no order is left to chance."""
    plan = layout.plan(config, num_query_heads=kv_heads * group, num_kv_heads=kv_heads)
    shape = (layout.batch, kv_heads, plan.tiles.shape[1], plan.units.shape[1])
    make = torch.Generator().manual_seed(seed)
    rank = torch.randperm(math.prod(shape), generator=make).view(shape)
    return Scores(rank.float() / max(rank.numel(), 1) * 8 - 4, plan)


def keep(batch: Batch, config: SparseConfig, **heads: int) -> tuple[Selection, Tensor]:
    """A checked selection, and the scores that it was made from."""
    layout = TokenLayout.from_rows(batch[0], padding_side=batch[1])
    scores = random_scores(layout, config, **heads)
    return mms.select(scores, layout, config).check(), scores.values


def one_row(row: Row, **fields: object) -> SparseConfig:
    return SparseConfig(**{"tile": 64, "sinks": 4, "window": 8, **fields})


def kept_units(selection: Selection) -> Tensor:
    """(B, K, T, U) bool."""
    plan, index = selection.plan, selection.index
    kept = torch.zeros(*index.shape[:3], plan.units.shape[1], dtype=torch.bool)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, index.shape[:3])).tolist():
        kept[b, h, t, index[b, h, t, : selection.count[b, h, t]].long()] = True
    return kept


def scored_again(model: nn.Module, call: AttentionCall) -> Scores:
    """Scores of a captured call, with their graph."""
    layer = attention_layers(model)[call.name]
    return layer.ranks.score_plan(call.q, call.k, call.plan(), call.scale)

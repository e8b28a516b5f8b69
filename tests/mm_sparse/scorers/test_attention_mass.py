"""True softmax mass of units, which scorers learn to predict, against the whole matrix."""

import math
import re

import pytest
import torch
from torch import Tensor

import mm_sparse as mms
from mm_sparse import PooledScorer
from mm_sparse.layout.plan import Plan
from tests.support.layouts import (
    BATCHES,
    GROUPS,
    IDS,
    assert_equal_where_visible,
    layout_of,
    random_qk,
    seen_batch,
    small_config,
)


def mass_by_hand(q: Tensor, k: Tensor, plan: Plan) -> Tensor:
    """(B, K, T, U) from the whole matrix of attention weights."""
    layout = plan.layout
    low, high = plan.span.unbind(-1)
    key = torch.arange(layout.length)
    seen = (key >= low[..., None]) & (key < high[..., None]) & layout.valid[:, None]
    scores = q @ k.repeat_interleave(plan.group, 1).transpose(-1, -2) / math.sqrt(q.shape[-1])
    weight = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1).nan_to_num(0.0)
    mass = torch.zeros(q.shape[0], k.shape[1], plan.tiles.shape[1], plan.units.shape[1])
    for b in range(q.shape[0]):
        for t, (start, size) in enumerate(plan.tiles[b].tolist()):
            rows = torch.arange(start, start + size)
            rows = rows[seen[b, rows].any(-1)]
            for u, (first, count) in enumerate(plan.units[b].tolist()):
                if len(rows):
                    part = weight[b][:, rows, first : first + count].sum(-1)  # (H, rows)
                    part = part.view(k.shape[1], -1)
                    best = plan.config.reduce == "max"
                    mass[b, :, t, u] = part.amax(-1) if best else part.mean(-1)
    return mass


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS, ids=lambda x: str(x))
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_unit_mass_is_the_softmax_mass_of_all_rows(
    name: str, heads: int, kv_heads: int, reduce: str
) -> None:
    layout = layout_of(name)
    q, k = random_qk(layout, heads, kv_heads)
    config = small_config(reduce=reduce)
    plan = layout.plan(config, num_query_heads=heads, num_kv_heads=kv_heads)
    mass = mms.unit_mass(q, k, plan)
    torch.testing.assert_close(mass, mass_by_hand(q, k, plan), rtol=1e-4, atol=1e-6)


def test_unit_mass_of_a_tile_adds_up_to_one_and_padding_has_none() -> None:
    rows, side = BATCHES["padded-left"]
    layout = layout_of("padded-left")
    q, k = random_qk(layout, 3, 1)
    plan = layout.plan(small_config(), num_query_heads=3, num_kv_heads=1)
    total = mms.unit_mass(q, k, plan).sum(-1)[:, 0]
    live = plan.visible.any(-1)
    assert live.any()
    assert not live.all()
    torch.testing.assert_close(total[live], torch.ones_like(total[live]))
    assert (total[~live] == 0).all()
    assert seen_batch(rows, side, small_config()).any()


def test_unit_mass_in_blocks_equals_unit_mass_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of("padded-left")
    q, k = random_qk(layout, 6, 2)
    plan = layout.plan(small_config(), num_query_heads=6, num_kv_heads=2)
    mass = mms.unit_mass(q, k, plan)
    scores = PooledScorer()(q, k, layout=layout, config=small_config()).values
    monkeypatch.setattr("mm_sparse.scorers.attention_mass.BLOCK_ELEMENTS", 1)
    torch.testing.assert_close(mms.unit_mass(q, k, plan), mass)
    again = PooledScorer()(q, k, layout=layout, config=small_config())
    assert_equal_where_visible(again.values, scores, plan, 1e-6)


def test_unit_mass_takes_a_scale() -> None:
    layout = layout_of("text")
    q, k = random_qk(layout)
    plan = layout.plan(small_config(), num_query_heads=1, num_kv_heads=1)
    doubled = mms.unit_mass(2 * q, k, plan, 1 / math.sqrt(8))
    torch.testing.assert_close(mms.unit_mass(q, k, plan, 2 / math.sqrt(8)), doubled)


def test_unit_mass_refuses_tensors_that_do_not_fit_the_plan() -> None:
    layout = layout_of("text")
    q, k = random_qk(layout, 4, 2)
    plan = layout.plan(small_config(), num_query_heads=4, num_kv_heads=2)
    for args, message in (
        ((q[0], k), "q must be (batch, heads, tokens, head dim), got (4, 70, 8)"),
        ((q[:, :2], k), "q must have 2 heads for each of k's as the plan has, got 2 and 2"),
        ((q[:, :, 1:], k), "q must have 70 tokens as the plan has, got 69"),
        ((q, k[:, :, 1:]), "layout must have 69 tokens as k has, got 70"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            mms.unit_mass(*args, plan)

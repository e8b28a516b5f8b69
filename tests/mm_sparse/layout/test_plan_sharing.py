"""Configs that cut alike share what follows from the pieces, and nothing else."""

from dataclasses import replace

import torch
from hypothesis import given

from mm_sparse import SparseConfig, TokenLayout
from mm_sparse.layout.plan import Plan
from tests.support.layouts import FEW, batches, configs
from tests.support.selections import Batch

HEADS = {"num_query_heads": 4, "num_kv_heads": 2}
TENSORS = ("tiles", "units", "visible", "always", "budget", "head_budget", "members", "tile_of")


def alone(batch: Batch, config: SparseConfig) -> Plan:
    layout = TokenLayout.from_rows(batch[0], padding_side=batch[1])
    return layout.plan(config, **HEADS)


@given(batches(), configs(), configs())
@FEW
def test_a_plan_is_that_of_its_own_config_whoever_came_first(
    batch: Batch, config: SparseConfig, first: SparseConfig
) -> None:
    # Cut alike, so that everything that can be shared is.
    alike = {name: getattr(config, name) for name in ("tile", "unit", "causal", "bidirectional")}
    first = replace(first, **alike)
    before = alone(batch, first)
    for name in TENSORS:
        getattr(before, name)
    want, found = alone(batch, config), before.layout.plan(config, **HEADS)
    for name in TENSORS:
        assert torch.equal(getattr(found, name), getattr(want, name)), name
    assert (found.config, found.max_kept) == (config, want.max_kept)


def test_a_budget_for_each_layer_needs_no_other_pieces() -> None:
    layout = TokenLayout.text(1, 300)
    one, other = (layout.plan(SparseConfig(ratio), **HEADS) for ratio in (0.2, 0.3))
    assert other.visible is one.visible
    assert other.always is one.always
    assert not torch.equal(other.budget, one.budget)
    assert layout.plan(SparseConfig(window=16), **HEADS).always is not one.always
    assert layout.plan(SparseConfig(unit=64), **HEADS).visible is not one.visible


def test_other_pieces_share_nothing() -> None:
    plan = TokenLayout.text(1, 300).plan(SparseConfig(), **HEADS)
    assert plan.visible.shape[1] == 5
    some = replace(plan, tiles=plan.tiles[:, :2], tile_span=plan.tile_span[:, :2])
    assert some.visible.shape[1] == 2

"""What is kept: budgets, floors and order, against slow loops."""

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, strategies as st
from torch import Tensor

import mm_sparse as mms
from mm_sparse import Modality, Scores, SparseConfig, TokenLayout
from mm_sparse.layout.plan import Plan
from mm_sparse.selection.density import count_pairs
from tests.support.layouts import (
    FEW,
    MIXED,
    TEXT,
    batches,
    configs,
    seen_batch,
)
from tests.support.selections import Batch, keep, kept_units, one_row, random_scores


def kept_by_hand(values: Tensor, plan: Plan) -> Tensor:
    """(B, K, T, U) bool, one tile at a time, from the words of `select`."""
    kept = torch.zeros_like(values, dtype=torch.bool)
    config, sizes = plan.config, plan.units[..., 1].tolist()
    for b, h, t in torch.cartesian_prod(*map(torch.arange, values.shape[:3])).tolist():
        score, size = values[b, h, t].tolist(), sizes[b]
        seen = plan.visible[b, t].nonzero().flatten().tolist()
        if not seen:
            continue
        best = sorted(seen, key=lambda u: -score[u])
        budget = int(plan.head_budget.expand(-1, values.shape[1], -1)[b, h, t])
        first = set(plan.always[b, t].nonzero().flatten().tolist())
        for kind, share in config.floors().items():
            held = 0
            for u in best:
                if plan.unit_modality[b, u] == int(kind) and held < budget * share:
                    first.add(u)
                    held += size[u]
        order = [u for u in best if u in first] + [u for u in best if u not in first]
        held, total = 0.0, sum(math.exp(score[u]) for u in seen)
        for place, u in enumerate(order):
            if config.top_p is not None:
                fits = held * (1 - 1e-6) < config.top_p
                held += math.exp(score[u]) / total
            else:
                fits = held + (size[u] + 1) // 2 <= budget
                held += size[u]
            kept[b, h, t, u] = u in first or fits or place == 0
    return kept


@given(batches(), configs(), st.sampled_from([(1, 1), (2, 1), (1, 3)]))
@FEW
def test_only_visible_units_are_kept_in_ascending_order(
    batch: Batch, config: SparseConfig, heads: tuple[int, int]
) -> None:
    selection, _ = keep(batch, config, kv_heads=heads[0], group=heads[1])
    index, count, plan = selection.index, selection.count, selection.plan
    assert not (kept_units(selection) & ~plan.visible[:, None]).any()
    slot = torch.arange(index.shape[-1])
    assert (index[slot >= count[..., None]] == -1).all()
    assert ((index[..., 1:] > index[..., :-1]) | (slot[1:] >= count[..., None])).all()
    assert torch.equal(count > 0, plan.visible.any(-1)[:, None].expand_as(count))


@given(batches(), configs(top_p=None), st.sampled_from([(1, 1), (2, 3)]))
@FEW
def test_budgets_are_kept_to_the_nearest_unit(
    batch: Batch, config: SparseConfig, heads: tuple[int, int]
) -> None:
    selection, values = keep(batch, config, kv_heads=heads[0], group=heads[1])
    assert torch.equal(kept_units(selection), kept_by_hand(values, selection.plan))


@given(batches(), configs(), st.floats(0.01, 1.0))
@FEW
def test_a_mass_budget_keeps_the_best_units_that_reach_it(
    batch: Batch, config: SparseConfig, mass: float
) -> None:
    config = dataclasses.replace(config, top_p=mass, modality_floor=0.0)
    selection, values = keep(batch, config)
    plan, kept = selection.plan, kept_units(selection)
    share = values.masked_fill(~plan.visible[:, None], -math.inf).softmax(-1).nan_to_num(0.0)
    reached = (share * kept).sum(-1)
    live = plan.visible.any(-1)[:, None].expand_as(reached)
    assert (reached[live] >= mass - 1e-5).all()
    optional = kept & ~plan.always[:, None]
    assume(plan.units.shape[1])
    least = torch.where(optional, share, math.inf).amin(-1)
    more_than_one = live & optional.any(-1) & (kept.sum(-1) > 1)
    assert ((reached - least)[more_than_one] < mass + 1e-5).all(), "one unit less would do"


@given(batches(), configs())
@FEW
def test_sinks_window_and_floors_are_kept_within_any_budget(
    batch: Batch, config: SparseConfig
) -> None:
    selection, _ = keep(batch, config)
    plan, kept = selection.plan, kept_units(selection)
    assert not (plan.always[:, None] & ~kept).any()
    size = plan.units[:, None, :, 1]
    for kind, share in config.floors().items():
        own = (plan.unit_modality == int(kind))[:, None] & plan.visible
        in_view = (own * size).sum(-1)
        wanted = torch.minimum(plan.budget * share, in_view.double())
        held = ((kept & own[:, None]) * size[:, None]).sum(-1)
        assert (held >= wanted[:, None] - 1e-6).all(), kind


def test_floors_come_on_top_of_sinks_and_window_that_fill_the_budget() -> None:
    """What is always kept may take more units than the budget has; none of it gives way."""
    config = SparseConfig(
        tokens=64, sinks=64, window=128, modality_floor={Modality.IMAGE: 1.0}, tile=64, unit=16
    )
    selection, _ = keep(([[("text", 64), ("image", 256), ("text", 512)]], "right"), config)
    plan, kept = selection.plan, kept_units(selection)
    assert (kept | ~plan.always[:, None]).all()
    images = kept[0, 0, -1] & (plan.unit_modality[0] == int(Modality.IMAGE))
    assert int(images.sum()) == 4
    assert int(kept[0, 0, -1].sum()) == int(plan.always[0, -1].sum()) + 4


@given(batches(), configs())
@FEW
def test_a_ratio_of_one_keeps_all_that_is_visible(batch: Batch, config: SparseConfig) -> None:
    config = dataclasses.replace(config, ratio=1.0, tokens=None, top_p=None)
    selection, _ = keep(batch, config)
    assert torch.equal(kept_units(selection), selection.plan.visible[:, None])
    assert selection.density() == 1.0
    seen = seen_batch(*batch, config)
    assert torch.equal(selection.to_dense_mask(), seen[:, None])


def test_a_mass_of_one_keeps_all_that_is_visible() -> None:
    selection, _ = keep(([MIXED, TEXT], "left"), one_row(MIXED, top_p=1.0))
    assert torch.equal(kept_units(selection), selection.plan.visible[:, None])


def test_a_budget_of_tokens_is_the_same_for_every_tile_that_sees_as_many() -> None:
    config = one_row(TEXT, tokens=96, sinks=0, window=0)
    selection, _ = keep(([[("text", 1024)]], "right"), config)
    assert selection.count[0, 0].tolist() == [4] + [6] * 15


@given(batches(), configs(), st.floats(0.02, 1.0), st.floats(0.02, 1.0))
@FEW
def test_a_larger_ratio_keeps_all_that_a_smaller_one_keeps(
    batch: Batch, config: SparseConfig, one: float, other: float
) -> None:
    config = dataclasses.replace(config, tokens=None, top_p=None)
    few, many = (
        keep(batch, dataclasses.replace(config, ratio=ratio))[0] for ratio in sorted((one, other))
    )
    assert not (kept_units(few) & ~kept_units(many)).any()
    assert few.density() <= many.density()


def test_scores_that_are_not_finite_rank_at_the_ends() -> None:
    layout, config = TokenLayout.text(1, 512), one_row(TEXT, ratio=0.25, sinks=0, window=0)
    scores = random_scores(layout, config)
    values = scores.values.clone()
    values[..., 1], values[..., 2], values[..., 3] = math.nan, math.inf, -math.inf
    kept = kept_units(mms.select(Scores(values, scores.plan), layout, config).check())[0, 0, -1]
    assert kept[2]
    assert not kept[1]
    assert not kept[3]
    assert int(kept.sum()) == 8


def test_scores_without_a_number_still_keep_the_budget() -> None:
    layout, config = TokenLayout.text(1, 512), one_row(TEXT, ratio=0.25)
    scores = random_scores(layout, config)
    for fields in ({}, {"top_p": 0.5}):
        other = dataclasses.replace(config, **fields)
        plan = layout.plan(other, num_query_heads=1, num_kv_heads=1)
        nothing = torch.full_like(scores.values, math.nan)
        selection = mms.select(Scores(nothing, plan), layout, other).check()
        assert (selection.count >= 1).all()


def test_selecting_passes_no_gradient_and_changes_no_score() -> None:
    layout, config = TokenLayout.text(1, 256), one_row(TEXT)
    scores = random_scores(layout, config)
    values = scores.values.clone().requires_grad_()
    selection = mms.select(Scores(values, scores.plan), layout, config)
    assert not selection.index.requires_grad
    assert torch.equal(values.detach(), scores.values)


def test_plain_values_select_as_scores_do() -> None:
    layout, config = TokenLayout.from_spans(MIXED), one_row(MIXED)
    scores = random_scores(layout, config, kv_heads=2, group=3)
    want = mms.select(scores, layout, config)
    got = mms.select(scores.values, layout, config, num_query_heads=6)
    assert torch.equal(got.index, want.index)
    assert got.plan is want.plan
    assert got.num_query_heads == 6


def test_empty_batches_and_rows_select_nothing() -> None:
    for layout in (TokenLayout.text(0, 10), TokenLayout.text(2, 0)):
        scores = random_scores(layout, one_row(TEXT))
        selection = mms.select(scores, layout, one_row(TEXT)).check()
        assert selection.count.sum() == 0
        assert selection.density() == 1.0
        assert selection.to_dense_mask().shape == (layout.batch, 1, layout.length, layout.length)


@given(batches(), configs(top_p=None, tokens=None), st.tuples(*[st.floats(0.02, 1.0)] * 3))
@FEW
def test_heads_keep_what_they_would_keep_with_one_ratio(
    batch: Batch, config: SparseConfig, ratios: tuple[float, float, float]
) -> None:
    layout = TokenLayout.from_rows(batch[0], padding_side=batch[1])
    config = dataclasses.replace(config, ratio=ratios[0], head_ratio=ratios)
    scores = random_scores(layout, config, kv_heads=3)
    kept = kept_units(mms.select(scores, layout, config).check())
    for head, ratio in enumerate(ratios):
        alone = dataclasses.replace(config, ratio=ratio, head_ratio=())
        values = scores.values[:, head : head + 1]
        own = mms.select(values, layout, alone, num_query_heads=1)
        assert torch.equal(kept[:, head], kept_units(own)[:, 0])


@given(batches(), configs(top_p=None, tokens=None), st.lists(st.floats(0.02, 1.0), min_size=6))
@FEW
def test_tiles_keep_what_they_would_keep_with_the_ratio_of_their_modality(
    batch: Batch, config: SparseConfig, ratios: list[float]
) -> None:
    layout = TokenLayout.from_rows(batch[0], padding_side=batch[1])
    heads = {kind: tuple(ratios[2 * i : 2 * i + 2]) for i, kind in enumerate(Modality) if i < 3}
    config = dataclasses.replace(config, query_ratio=heads)
    scores = random_scores(layout, config, kv_heads=2)
    kept = kept_units(mms.select(scores, layout, config).check())
    # Video and tiles of padding alone keep the one ratio.
    even = (config.ratio, config.ratio)
    for kind, own in {**heads, Modality.VIDEO: even, None: even}.items():
        alone = dataclasses.replace(config, head_ratio=own, query_ratio={})
        wanted = kept_units(mms.select(scores.values, layout, alone, num_query_heads=2))
        of_kind = scores.plan.query_modality == (-1 if kind is None else int(kind))
        rows, tiles = of_kind.nonzero(as_tuple=True)
        assert torch.equal(kept[rows, :, tiles], wanted[rows, :, tiles])


def test_text_alone_is_selected_as_by_head_bit_for_bit() -> None:
    layout, heads = TokenLayout.text(2, 500), (0.1, 0.35)
    by_head = SparseConfig(0.2, head_ratio=heads, sinks=16, window=32, sample_ratio=0.5)
    by_kind = SparseConfig(
        0.2, query_ratio={"TEXT": heads, "IMAGE": 0.9}, sinks=16, window=32, sample_ratio=0.5
    )
    chosen = []
    for config in (by_head, by_kind):
        scores = random_scores(layout, config, kv_heads=2)
        made = mms.select(scores.values, layout, config, num_query_heads=2).check()
        chosen.append(made)
    assert torch.equal(kept_units(chosen[0]), kept_units(chosen[1]))
    assert torch.equal(chosen[0].count, chosen[1].count)


def test_mean_density_is_that_of_one_ratio() -> None:
    """Ratios whose mean over visible pairs is one ratio keep as many pairs as that."""
    layout = TokenLayout.from_spans([("image", (32, 32)), ("text", 512)], batch=1)
    even = SparseConfig(0.2, tile=64, unit=16, sinks=0, window=0, bidirectional=())
    scores = random_scores(layout, even, kv_heads=2)
    one = mms.select(scores.values, layout, even, num_query_heads=2)
    _, seen = count_pairs(one.index, one.count, one.plan)
    text = (seen[Modality.TEXT].sum() / seen.sum()).item()
    kinds = {"TEXT": (0.2 - (1 - text) * 0.1) / text, "IMAGE": (0.05, 0.15)}
    config = dataclasses.replace(even, query_ratio=kinds)
    own = mms.select(scores.values, layout, config, num_query_heads=2)
    assert own.density() == pytest.approx(one.density(), rel=0.02)
    by_pair = own.density_by_modality()
    assert by_pair[Modality.IMAGE, Modality.IMAGE] == pytest.approx(0.1, rel=0.1)
    assert by_pair[Modality.TEXT, Modality.TEXT] > 0.2


def test_ratios_must_be_as_many_as_kv_heads() -> None:
    layout, config = TokenLayout.text(1, 64), SparseConfig(query_ratio={"IMAGE": (0.2, 0.3)})
    with pytest.raises(ValueError, match="query_ratio must have a ratio for each of 3 KV heads"):
        layout.plan(config, num_query_heads=3, num_kv_heads=3)
    layout, config = TokenLayout.text(1, 64), SparseConfig(head_ratio=(0.2, 0.3))
    with pytest.raises(ValueError, match="head_ratio must have a ratio for each of 3 KV heads"):
        layout.plan(config, num_query_heads=3, num_kv_heads=3)

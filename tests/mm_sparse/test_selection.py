"""What is kept: budgets, floors, order, density, and the same selection in other forms."""

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention

import mm_sparse as mms
from mm_sparse import Modality, Scores, Selection, SparseConfig, TokenLayout
from mm_sparse.plan import Plan
from tests.mm_sparse.layouts import (
    FEW,
    HOLE,
    MIXED,
    PACKED,
    SHORT,
    TEXT,
    Row,
    batches,
    configs,
    members,
    seen_batch,
)

Batch = tuple[list[Row], str]
ROWS = {"mixed": MIXED, "packed": PACKED, "hole": HOLE, "short-segments": SHORT, "text": TEXT}


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
        budget = int(plan.budget[b, t])
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
            if config.mass is not None:
                fits = held * (1 - 1e-6) < config.mass
                held += math.exp(score[u]) / total
            else:
                fits = held + (size[u] + 1) // 2 <= budget
                held += size[u]
            kept[b, h, t, u] = u in first or fits or place == 0
    return kept


# Which units.


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


@given(batches(), configs(mass=None), st.sampled_from([(1, 1), (2, 3)]))
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
    config = dataclasses.replace(config, mass=mass, modality_floor=0.0)
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
    config = dataclasses.replace(config, ratio=1.0, tokens=None, mass=None)
    selection, _ = keep(batch, config)
    assert torch.equal(kept_units(selection), selection.plan.visible[:, None])
    assert selection.density() == 1.0
    seen = seen_batch(*batch, config)
    assert torch.equal(selection.to_dense_mask(), seen[:, None])


def test_a_mass_of_one_keeps_all_that_is_visible() -> None:
    selection, _ = keep(([MIXED, TEXT], "left"), one_row(MIXED, mass=1.0))
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
    config = dataclasses.replace(config, tokens=None, mass=None)
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
    for fields in ({}, {"mass": 0.5}):
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


# Density.


@given(batches(), configs(), st.sampled_from([(1, 1), (2, 3)]))
@FEW
def test_density_counts_pairs_of_the_dense_mask(
    batch: Batch, config: SparseConfig, heads: tuple[int, int]
) -> None:
    selection, _ = keep(batch, config, kv_heads=heads[0], group=heads[1])
    seen = int(seen_batch(*batch, config).sum()) * heads[0] * heads[1]
    kept = int(selection.to_dense_mask().sum())
    assert selection.density() == pytest.approx(kept / seen if seen else 1.0)


@given(batches(), configs())
@FEW
def test_the_dense_mask_is_what_is_kept_and_seen(batch: Batch, config: SparseConfig) -> None:
    selection, _ = keep(batch, config)
    plan = selection.plan
    tiles = members(plan.tiles, plan.num_queries).float()
    units = members(plan.units, plan.layout.length).float()
    kept = torch.einsum("btn,bhtu,bum->bhnm", tiles, kept_units(selection).float(), units) > 0
    want = kept & seen_batch(*batch, config)[:, None]
    assert torch.equal(selection.to_dense_mask(), want)


def test_density_by_modality_counts_pairs_of_the_dense_mask() -> None:
    row: Row = [("text", 96), ("image", (8, 16)), ("text", 64), ("audio", 130), ("text", 64)]
    selection, _ = keep(([row], "right"), one_row(row, ratio=0.3), kv_heads=2)
    kept = selection.to_dense_mask().sum(1)[0].double()
    config = selection.plan.config
    seen = seen_batch([row], "right", config)[0].double() * 2
    modality = selection.plan.layout.modality[0]
    got = selection.density_by_modality()
    assert set(got) == {
        (a, b) for a in Modality for b in Modality if seen[modality == a][:, modality == b].any()
    }
    for (a, b), density in got.items():
        part = [x[modality == a][:, modality == b].sum() for x in (kept, seen)]
        assert density == pytest.approx(float(part[0] / part[1]))
        assert isinstance(a, Modality)


@given(batches(), configs())
@FEW
def test_density_lies_between_those_of_the_modalities(batch: Batch, config: SparseConfig) -> None:
    selection, _ = keep(batch, config)
    parts = selection.density_by_modality().values()
    if parts:
        assert min(parts) - 1e-9 <= selection.density() <= max(parts) + 1e-9


def test_density_of_nothing_visible_is_one() -> None:
    selection, _ = keep(([[("pad", 30)]], "right"), one_row(TEXT))
    assert selection.density() == 1.0
    assert selection.density_by_modality() == {}
    assert not selection.to_dense_mask().any()


# Other forms.


@given(batches(), configs(), st.sampled_from([(1, 1), (2, 3)]), st.sampled_from([16, 64, 128]))
@FEW
def test_the_block_mask_is_the_dense_mask(
    batch: Batch, config: SparseConfig, heads: tuple[int, int], block: int
) -> None:
    selection, _ = keep(batch, config, kv_heads=heads[0], group=heads[1])
    plan = selection.plan
    if not plan.layout.length:
        return
    assert_is_block_mask(selection, block)


def assert_is_block_mask(selection: Selection, block: int) -> None:
    plan, want = selection.plan, selection.to_dense_mask()
    mask = selection.to_block_mask(block)
    size = (plan.layout.batch, selection.num_query_heads, plan.num_queries, plan.layout.length)
    assert torch.equal(create_mask(mask.mask_mod, *size, device="cpu"), want)
    assert mask.seq_lengths == size[2:]
    listed = mask.to_dense().bool()
    rows, columns = -(-size[2] // block), -(-size[3] // block)
    assert listed.shape == (*size[:2], rows, columns)
    pad = (0, columns * block - size[3], 0, rows * block - size[2])
    blocks = torch.nn.functional.pad(want, pad).unflatten(3, (columns, block))
    blocks = blocks.unflatten(2, (rows, block)).any(3).any(-1)
    assert not (blocks & ~listed).any(), "a block with a kept pair is not listed"


def test_the_block_mask_of_a_chunk_of_queries_is_the_dense_mask() -> None:
    layout, config = TokenLayout.from_rows([MIXED, TEXT], "left"), one_row(MIXED)
    plan = layout.plan(config, num_query_heads=3, num_kv_heads=1, num_queries=37)
    values = torch.randn(2, 1, plan.tiles.shape[1], plan.units.shape[1])
    assert_is_block_mask(mms.select(Scores(values, plan), layout, config), 32)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_under_the_block_mask_is_attend() -> None:
    layout, config = TokenLayout.from_spans(MIXED), one_row(MIXED, ratio=0.4)
    selection, _ = keep(([MIXED], "right"), config, kv_heads=2, group=3)
    q = torch.randn(1, 6, layout.length, 16)
    k, v = torch.randn(2, 1, 2, layout.length, 16)
    want = flex_attention(q, k, v, block_mask=selection.to_block_mask(), enable_gqa=True)
    torch.testing.assert_close(mms.attend(q, k, v, selection), want)


@pytest.mark.parametrize("name", ROWS)
def test_a_mask_of_units_makes_the_same_selection_again(name: str) -> None:
    row = ROWS[name]
    selection, _ = keep(([row, TEXT], "right"), one_row(row, ratio=0.4), kv_heads=2)
    again = Selection.from_mask(kept_units(selection), selection.plan).check()
    assert torch.equal(again.count, selection.count)
    length = again.index.shape[-1]
    assert length == max(int(selection.count.max()), 1)
    assert torch.equal(again.index, selection.index[..., :length])


def test_a_mask_of_nothing_keeps_nothing() -> None:
    plan = TokenLayout.text(1, 100).plan(SparseConfig(), num_query_heads=1, num_kv_heads=1)
    nothing = torch.zeros(1, 1, plan.tiles.shape[1], plan.units.shape[1], dtype=torch.bool)
    selection = Selection.from_mask(nothing, plan).check()
    assert (selection.count == 0).all()
    assert not selection.to_dense_mask().any()


@given(batches(), configs(), st.sampled_from([1, 2]))
@FEW
def test_the_transposed_lists_hold_the_tiles_of_every_unit(
    batch: Batch, config: SparseConfig, kv_heads: int
) -> None:
    selection, _ = keep(batch, config, kv_heads=kv_heads)
    tiles, offsets = selection.transpose()
    kept, plan = kept_units(selection), selection.plan
    num_units = plan.units.shape[1]
    seen = seen_batch(*batch, config)
    of_tile, of_unit = (members(x, plan.layout.length) for x in (plan.tiles, plan.units))
    assert offsets[-1] == kept.sum()
    for b, h, u in torch.cartesian_prod(*map(torch.arange, (len(seen), kv_heads, num_units))):
        at = 2 * int((b * kv_heads + h) * num_units + u)
        start, cut, end = offsets[at : at + 3].tolist()
        assert sorted(tiles[start:end].tolist()) == kept[b, h, :, u].nonzero().flatten().tolist()
        for part in (tiles[start:cut], tiles[cut:end]):
            assert part.tolist() == sorted(part.tolist())
        for t in tiles[start:cut].tolist():
            pairs = seen[b][of_tile[b, t]][:, of_unit[b, u]]
            assert pairs.all()
            assert int(plan.units[b, u, 1]) == plan.unit


# Bad input.


def good_selection() -> Selection:
    return keep(([[("text", 256)]], "right"), one_row(TEXT, ratio=0.5, tokens=64))[0]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((0, 0, 3, 0), 16, "index must hold unit ids in [0, 16) up to count"),
        ((0, 0, 3, 1), -1, "index must hold unit ids in [0, 16) up to count"),
        ((0, 0, 3, 1), 0, "index must ascend within each list"),
    ],
    ids=["too-large", "negative", "twice"],
)
def test_lists_that_are_not_ascending_units_are_refused(
    place: tuple[int, ...], value: int, message: str
) -> None:
    selection = good_selection()
    index = selection.index.clone()
    index[place[:3]] = torch.arange(index.shape[-1], dtype=torch.int32)
    index[place] = value
    count = torch.full_like(selection.count, 3)
    index[..., 3:] = -1
    index[:, :, :3] = torch.arange(index.shape[-1], dtype=torch.int32)
    with pytest.raises(ValueError, match=re.escape(message)):
        Selection(index, count, selection.plan).check()


@pytest.mark.parametrize("count", [-1, 99])
def test_counts_that_the_lists_do_not_hold_are_refused(count: int) -> None:
    selection = good_selection()
    length = selection.index.shape[-1]
    index = torch.arange(length, dtype=torch.int32).expand_as(selection.index)
    wrong = selection.count.clone()
    wrong[0, 0, 1] = count
    with pytest.raises(ValueError, match=re.escape(f"count must be in [0, {length}]")):
        Selection(index, wrong, selection.plan).check()


def test_what_stands_behind_count_is_not_read() -> None:
    selection = good_selection()
    slot = torch.arange(selection.index.shape[-1])
    junk = selection.index.masked_fill(slot >= selection.count[..., None], 10**6)
    other = Selection(junk, selection.count, selection.plan).check()
    assert torch.equal(other.to_dense_mask(), selection.to_dense_mask())
    assert other.density() == selection.density()


def test_tensors_that_are_no_lists_of_the_plan_are_refused() -> None:
    selection = good_selection()
    index, count, plan = selection.index, selection.count, selection.plan
    tiles = plan.tiles.shape[1]
    for args, message in (
        ((index.long(), count), "index must be int32 with 4 dimensions, got torch.int64"),
        ((index[0], count), "index must be int32 with 4 dimensions, got torch.int32"),
        ((index, count[..., None]), "count must be int32 with 3 dimensions, got torch.int32"),
        ((index, count.float()), "count must be int32 with 3 dimensions, got torch.float32"),
        ((index[:, :, 1:], count), f"index must have 1 rows and {tiles} tiles as the plan has"),
        ((index, count.repeat(2, 1, 1)), f"count must have 1 rows and {tiles} tiles as the plan"),
        ((index, count.repeat(1, 2, 1)), "count must have index's 1 heads, got 2"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Selection(*args, plan)
    with pytest.raises(TypeError, match="index must be a tensor, got list"):
        Selection([[1]], count, plan)  # type: ignore[arg-type]


def test_a_mask_that_is_none_of_units_is_refused() -> None:
    plan = good_selection().plan
    tiles = plan.tiles.shape[1]
    message = "kept must be bool (batch, KV heads, tiles, 16), got"
    for bad in (
        torch.ones(1, 1, tiles, 16),
        torch.ones(1, tiles, 16).bool(),
        torch.ones(1, 1, tiles, 15).bool(),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Selection.from_mask(bad, plan)


def test_scores_of_another_layout_or_config_are_refused() -> None:
    layout, config = TokenLayout.text(1, 256), one_row(TEXT)
    scores = random_scores(layout, config)
    with pytest.raises(ValueError, match="layout must be the one that scores were computed for"):
        mms.select(scores, TokenLayout.text(1, 256), config)
    other = dataclasses.replace(config, ratio=0.5)
    message = f"config must be the one that scores were computed for, {config}, got {other}"
    with pytest.raises(ValueError, match=re.escape(message)):
        mms.select(scores, layout, other)


@pytest.mark.parametrize(
    "shape", [(2, 1, 4, 16), (1, 1, 3, 16), (1, 1, 4, 17)], ids=["batch", "tiles", "units"]
)
def test_scores_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    layout, config = TokenLayout.text(1, 256), one_row(TEXT)
    plan = random_scores(layout, config).plan
    message = f"scores must be (batch, KV heads, tiles, units) = (1, *, 4, 16), got {shape}"
    for scores in (torch.zeros(shape), Scores(torch.zeros(shape), plan)):
        with pytest.raises(ValueError, match=re.escape(message)):
            mms.select(scores, layout, config)


def test_values_that_are_no_scores_are_refused() -> None:
    layout, config = TokenLayout.text(1, 256), one_row(TEXT)
    message = "scores must be (batch, KV heads, tiles, units), got (4, 16)"
    with pytest.raises(ValueError, match=re.escape(message)):
        mms.select(torch.zeros(4, 16), layout, config)
    with pytest.raises(TypeError, match="scores must be Scores or a tensor, got list"):
        mms.select([[0.0]], layout, config)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scores must be on cpu as layout is, got meta"):
        mms.select(torch.zeros(1, 1, 4, 16, device="meta"), layout, config)
    with pytest.raises(ValueError, match="num_query_heads must be a multiple of num_kv_heads"):
        mms.select(torch.zeros(1, 2, 4, 16), layout, config, num_query_heads=3)


def test_empty_batches_and_rows_select_nothing() -> None:
    for layout in (TokenLayout.text(0, 10), TokenLayout.text(2, 0)):
        scores = random_scores(layout, one_row(TEXT))
        selection = mms.select(scores, layout, one_row(TEXT)).check()
        assert selection.count.sum() == 0
        assert selection.density() == 1.0
        assert selection.to_dense_mask().shape == (layout.batch, 1, layout.length, layout.length)

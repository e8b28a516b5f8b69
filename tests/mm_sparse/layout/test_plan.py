"""How rows are cut into tiles and units, and what the tables say of them."""

import pytest
import torch
from hypothesis import assume, given, strategies as st
from torch import Tensor

import mm_sparse as mms
from mm_sparse import Modality, SparseConfig, TokenLayout
from mm_sparse.layout.plan import Plan
from tests.support.layouts import (
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
    sees_unit,
)
from tests.support.selections import Batch


def plan_of(batch: Batch, config: SparseConfig, group: int = 1, **queries: int) -> Plan:
    layout = TokenLayout.from_rows(batch[0], padding_side=batch[1])
    return layout.plan(config, num_query_heads=group, num_kv_heads=1, **queries)


def pieces(table: Tensor) -> list[tuple[int, int]]:
    """(start, end) of the pieces of a row without fillers."""
    return [(start, start + size) for start, size in table.tolist() if size]


def assert_cut_where_segments_end(table: Tensor, segment: Tensor, valid: Tensor, size: int) -> None:
    """Of one row: no piece holds both padding and tokens, or an end of a long segment."""
    labels, lengths = torch.unique_consecutive(segment, return_counts=True)
    long = (lengths >= size).repeat_interleave(lengths)
    number = torch.arange(len(labels)).repeat_interleave(lengths)
    for start, end in pieces(table):
        assert end - start <= size
        assert valid[start:end].unique().numel() == 1
        for i in range(start + 1, end):
            if number[i] != number[i - 1]:
                assert not long[i]
                assert not long[i - 1]


@given(batches(), configs(), st.sampled_from([1, 3, 8]))
@FEW
def test_tiles_part_the_queries_and_units_the_valid_keys(
    batch: Batch, config: SparseConfig, group: int
) -> None:
    plan = plan_of(batch, config, group)
    length = plan.layout.length
    assert torch.equal(members(plan.tiles, length).sum(1), torch.ones(plan.layout.batch, length))
    assert torch.equal(members(plan.units, length).sum(1).bool(), plan.layout.valid)
    assert members(plan.units, length).sum(1).max().item() <= 1 if length else True
    for table in (plan.tiles, plan.units):
        for row in table:
            starts = [start for start, _ in pieces(row)]
            assert starts == sorted(starts)
            assert all(row[len(starts) :, 1] == 0), "fillers stand behind the pieces"


@given(batches(), configs(), st.sampled_from([1, 3, 8]))
@FEW
def test_pieces_end_where_segments_end_unless_both_are_short(
    batch: Batch, config: SparseConfig, group: int
) -> None:
    plan = plan_of(batch, config, group)
    layout = plan.layout
    assert plan.tile_tokens == config.tile // group
    for b in range(layout.batch):
        row = layout.segment[b], layout.valid[b]
        assert_cut_where_segments_end(plan.units[b], *row, config.unit)
        assert_cut_where_segments_end(plan.tiles[b], *row, plan.tile_tokens)


@given(batches(), configs(), st.sampled_from([1, 3]))
@FEW
def test_a_unit_is_visible_if_some_query_of_the_tile_sees_some_key_of_it(
    batch: Batch, config: SparseConfig, group: int
) -> None:
    plan = plan_of(batch, config, group)
    assert torch.equal(plan.visible, sees_unit(plan, seen_batch(*batch, config)))


@given(batches(), configs(), st.integers(0, 30), st.integers(0, 30))
@FEW
def test_queries_may_be_any_stretch_of_the_tokens(
    batch: Batch, config: SparseConfig, skipped: int, left: int
) -> None:
    seen = seen_batch(*batch, config)
    first = min(skipped, seen.shape[1])
    count = max(seen.shape[1] - first - left, 0)
    plan = plan_of(batch, config, num_queries=count, query_offset=first)
    assert (plan.num_queries, plan.query_offset) == (count, first)
    assert plan.span.shape[1] == count
    assert (members(plan.tiles, count).sum(1) == 1).all()
    part = seen[:, first : first + count]
    assert torch.equal(plan.visible, sees_unit(plan, part))
    low, high = plan.span.unbind(-1)
    key = torch.arange(seen.shape[1])
    pairs = (key >= low[..., None]) & (key < high[..., None]) & plan.layout.valid[:, None]
    assert torch.equal(pairs, part)


def test_queries_are_the_last_tokens_by_default() -> None:
    layout, config = TokenLayout.text(1, 100), SparseConfig()
    plan = layout.plan(config, num_query_heads=1, num_kv_heads=1, num_queries=7)
    assert plan.query_offset == 93
    assert plan.span[0].tolist() == [[0, 94 + i] for i in range(7)]


@pytest.mark.parametrize("unit", [16, 32, 64, 128])
def test_thousands_of_one_token_segments_make_few_units(unit: int) -> None:
    layout = TokenLayout.from_spans([("text", 1), ("image", 1)] * 3000)
    plan = layout.plan(SparseConfig(unit=unit), num_query_heads=1, num_kv_heads=1)
    assert plan.units.shape[1] == -(-6000 // unit)


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("extra", [0, 1, 3])
def test_units_are_at_most_three_for_each_unit_of_tokens(size: int, extra: int) -> None:
    """The worst that alternating long and short segments can do."""
    row = [("image", size + extra), ("text", 1)] * 40
    layout = TokenLayout.from_spans(row)
    plan = layout.plan(SparseConfig(unit=size), num_query_heads=1, num_kv_heads=1)
    assert plan.units.shape[1] <= 3 * layout.length / size + 1


@given(batches(), configs())
@FEW
def test_the_number_of_units_is_bounded_by_tokens_and_holes(
    batch: Batch, config: SparseConfig
) -> None:
    plan = plan_of(batch, config)
    for b in range(plan.layout.batch):
        valid = plan.layout.valid[b]
        holes = int((torch.unique_consecutive(valid) == 0).sum())
        for table, size in ((plan.units, config.unit), (plan.tiles, config.tile)):
            assert len(pieces(table[b])) <= 3 * plan.layout.length / size + 1 + 2 * holes


@given(batches(), configs(), st.sampled_from([1, 3]))
@FEW
def test_always_kept_are_sinks_and_window_that_are_visible(
    batch: Batch, config: SparseConfig, group: int
) -> None:
    plan = plan_of(batch, config, group)
    seen = seen_batch(*batch, config)
    document, length = plan.layout.document, plan.layout.length
    assume(length > 0)
    key = torch.arange(length)
    first = torch.where(document[:, :, None] == document[:, None], key, length).amin(-1)
    sink = (key[None] < first[..., None] + config.sinks) & (key[None] >= first[..., None])
    before = (key > key[:, None] - config.window) & (key <= key[:, None])
    around = (key - key[:, None]).abs() <= config.window // 2
    tiles = members(plan.tiles, length).float()
    reach = torch.einsum("btn,bnm->btm", tiles, seen.float()) > 0
    end = plan.tiles.sum(-1, keepdim=True)
    ahead = torch.einsum("bt,btn->bn", (reach & (key >= end)).any(-1).float(), tiles) > 0
    window = torch.where(ahead[..., None], around & (config.window > 0), before)
    least = sees_unit(plan, (sink | window) & seen)
    assert not (least & ~plan.always).any(), "a sink or a window is missing"
    assert not (plan.always & ~plan.visible).any()
    most = torch.einsum("btn,bnm->btm", tiles, (window | sink).float())
    of_unit = members(plan.units, length).float()
    near = torch.einsum("btm,bum->btu", most, of_unit) > 0
    holds_sink = torch.einsum("bnm,bum->bu", (sink & plan.layout.valid[..., None]).float(), of_unit)
    assert not (plan.always & ~near & (holds_sink == 0)[:, None]).any(), "more than asked"


def test_every_short_document_of_a_tile_keeps_its_sinks() -> None:
    config = SparseConfig(sinks=1, window=0, tile=64, unit=16, causal=False)
    plan = plan_of(([[("text", 20, d) for d in range(3)]], "right"), config)
    assert plan.tiles[0].tolist() == [[0, 60]]
    assert plan.always[0, 0].tolist() == [-(-a // 20) * 20 < b for a, b in pieces(plan.units[0])]


def test_always_kept_is_nothing_without_sinks_and_window() -> None:
    config = SparseConfig(sinks=0, window=0)
    assert not plan_of(([MIXED, TEXT], "left"), config).always.any()


def test_always_kept_in_one_text_is_the_start_and_what_is_before_the_tile() -> None:
    config = SparseConfig(sinks=17, window=20, tile=64, unit=16)
    plan = plan_of(([[("text", 512)]], "right"), config)
    kept = [row.nonzero().flatten().tolist() for row in plan.always[0]]
    assert kept[0] == [0, 1, 2, 3]
    assert kept[4] == [0, 1, 14, 15, 16, 17, 18, 19]


def test_the_window_of_an_encoder_lies_on_both_sides() -> None:
    config = SparseConfig(sinks=0, window=32, tile=64, unit=16, causal=False)
    plan = plan_of(([[("audio", 512)]], "right"), config)
    assert plan.always[0, 4].nonzero().flatten().tolist() == [15, 16, 17, 18, 19, 20]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
def test_padding_behind_a_row_does_not_change_what_is_always_kept(causal: bool) -> None:
    config = SparseConfig(sinks=4, window=40, tile=64, unit=16, causal=causal)
    alone = plan_of(([[("audio", 150)]], "right"), config)
    padded = plan_of(([[("audio", 150)], [("audio", 400)]], "right"), config)
    tiles, units = alone.always.shape[1:]
    assert torch.equal(padded.always[0, :tiles, :units], alone.always[0])
    assert not padded.always[0, :, units:].any()


@given(batches(), configs())
@FEW
def test_budgets_follow_the_visible_keys(batch: Batch, config: SparseConfig) -> None:
    plan = plan_of(batch, config)
    seen = (plan.visible * plan.units[:, None, :, 1]).sum(-1)
    for got, keys in zip(plan.budget.flatten().tolist(), seen.flatten().tolist(), strict=True):
        if config.top_p is not None:
            assert got == keys
        elif config.tokens is not None:
            assert got == min(config.tokens, keys)
        else:
            assert abs(got - config.ratio * keys) <= 0.5 or got == min(1, keys)
            assert got <= keys


def test_pieces_have_the_modality_of_most_of_their_tokens() -> None:
    plan = plan_of(([MIXED], "right"), SparseConfig(unit=64, tile=64))
    names = [Modality(int(m)).name for m in plan.unit_modality[0]]
    assert names == ["IMAGE", "TEXT", "AUDIO"] or len(names) == plan.units.shape[1]
    modality = plan.layout.modality[0]
    for (start, end), kind in zip(pieces(plan.units[0]), plan.unit_modality[0], strict=True):
        votes = torch.bincount(modality[start:end].long(), minlength=3)
        assert votes[int(kind)] == votes.max()


def test_a_tile_that_holds_text_has_the_ratio_of_text() -> None:
    """A sound and a question about it are shorter than a tile and share one."""
    layout = TokenLayout.from_spans([("image", (16, 16)), ("audio", 40), ("text", 5)], batch=2)
    config = SparseConfig(
        0.2, tile=64, sinks=0, window=0, query_ratio={"TEXT": (0.6, 0.4), "AUDIO": 0.05}
    )
    plan = layout.plan(config, num_query_heads=2, num_kv_heads=2)
    assert plan.tile_modality.tolist() == [[Modality.IMAGE] * 4 + [Modality.AUDIO]] * 2
    assert plan.query_modality.tolist() == [[Modality.IMAGE] * 4 + [Modality.TEXT]] * 2
    seen = plan.visible_tokens[0].tolist()
    assert plan.head_budget[0, :, -1].tolist() == [round(0.6 * seen[-1]), round(0.4 * seen[-1])]
    assert plan.head_budget[1, :, 0].tolist() == [round(0.2 * seen[0])] * 2
    # Some of the queries are tiles of the same modality.
    part = layout.plan(config, num_query_heads=2, num_kv_heads=2, num_queries=5)
    assert part.query_modality.tolist() == [[Modality.TEXT]] * 2
    assert torch.equal(part.head_budget, plan.head_budget[:, :, -1:])
    tiles = torch.tensor([[4, 0], [1, 4]])
    drawn = plan.of_tiles(tiles)
    assert torch.equal(drawn.query_modality, plan.query_modality.gather(1, tiles))
    behind = plan.select_tiles(slice(3, 5), slice(192, 301))
    assert torch.equal(behind.query_modality, plan.query_modality[:, 3:])


def test_fillers_and_padding_have_no_modality() -> None:
    plan = plan_of(([MIXED, TEXT], "left"), SparseConfig())
    assert (plan.unit_modality[plan.units[..., 1] == 0] == -1).all()
    covered = members(plan.tiles, plan.layout.length).float() @ plan.layout.valid.float()[..., None]
    assert ((plan.tile_modality == -1) == (covered[..., 0] == 0)).all()


@pytest.mark.parametrize(
    "row", [MIXED, PACKED, HOLE, SHORT], ids=["mixed", "packed", "hole", "short"]
)
def test_distance_is_from_middle_to_middle(row: Row) -> None:
    plan = plan_of(([row], "right"), SparseConfig(), num_queries=20, query_offset=10)
    for t, (start, end) in enumerate(pieces(plan.tiles[0])):
        for u, (first, last) in enumerate(pieces(plan.units[0])):
            middle = 10 + (start + end) / 2 - (first + last) / 2
            assert abs(int(plan.distance[0, t, u]) - middle) <= 1


def test_lead_says_that_pieces_lie_on_a_grid() -> None:
    config = SparseConfig(unit=16, tile=64)
    for row, lead, regular, tiles in (
        ([("text", 128)], 0, True, True),
        ([("text", 96)], 0, True, False),
        ([("text", 120)], 0, False, False),
        ([("text", 7)], 0, False, False),
        ([("text", 64), ("image", 64)], 0, True, True),
        ([("text", 63), ("image", 65)], -1, False, False),
        ([("text", 1), ("image", 64)], 15, False, False),
        ([("text", 5), ("image", 60)], 11, False, False),
        ([("text", 17), ("image", 60)], -1, False, False),
        ([("text", 64), ("pad", 64)], -1, False, True),
    ):
        plan = plan_of(([row], "right"), config)
        assert (plan.unit_offset, plan.regular, plan.regular_tiles) == (lead, regular, tiles), row
    rows = [[("text", 1), ("image", 64)]] * 2
    assert plan_of((rows, "right"), config).unit_offset == 15
    for other in ([("text", 64)], [("text", 2), ("image", 63)]):
        assert plan_of(([rows[0], other], "right"), config).unit_offset < 0


@FEW
@given(batch=batches())
def test_units_of_a_lead_are_where_it_says(batch) -> None:
    plan = plan_of(batch, SparseConfig(unit=16))
    if plan.unit_offset >= 0 and plan.layout.length:
        position = torch.arange(plan.layout.length)
        of_token = (members(plan.units, plan.layout.length).int().argmax(1)).expand(1, -1, -1)
        assert (of_token == (position + plan.unit_offset) // 16).all()


def test_plans_are_made_once_for_each_question() -> None:
    layout, config = TokenLayout.text(1, 100), SparseConfig()
    heads = {"num_query_heads": 4, "num_kv_heads": 2}
    plan = layout.plan(config, **heads)
    assert layout.plan(SparseConfig.from_json(config.to_json()), **heads) is plan
    assert layout.plan(config, num_query_heads=2, num_kv_heads=1) is plan
    assert layout.plan(config, **heads, num_queries=100, query_offset=0) is plan
    assert layout.plan(SparseConfig(ratio=0.3), **heads) is not plan
    assert layout.plan(config, num_query_heads=2, num_kv_heads=2) is not plan
    assert layout.plan(config, **heads, num_queries=99) is not plan
    assert mms.TokenLayout.text(1, 100).plan(config, **heads) is not plan


def test_empty_batches_and_rows_have_empty_plans() -> None:
    for layout in (TokenLayout.text(0, 10), TokenLayout.text(2, 0)):
        plan = layout.plan(SparseConfig(), num_query_heads=1, num_kv_heads=1)
        assert plan.visible.numel() == plan.always.numel() == plan.budget.numel() == 0
        assert plan.max_kept == 0 or plan.units.shape[1] >= plan.max_kept


def test_a_batch_of_padding_alone_has_one_unit_that_nobody_sees() -> None:
    plan = plan_of(([[("pad", 20)]], "right"), SparseConfig())
    assert plan.units.tolist() == [[[0, 0]]]
    assert plan.visible.shape == (1, 1, 1)
    assert not plan.visible.any()
    assert not plan.regular


def test_budgets_of_heads_lie_row_by_row() -> None:
    """Kernels go through them by their number."""
    layout = TokenLayout.from_rows([[("text", 100), ("image", (9, 9)), ("text", 30)]] * 2)
    for ratios in ({}, {"head_ratio": (1.0, 0.4)}, {"query_ratio": {"IMAGE": (0.7, 0.05)}}):
        plan = layout.plan(mms.SparseConfig(**ratios), num_query_heads=2, num_kv_heads=2)
        assert plan.head_budget.is_contiguous()

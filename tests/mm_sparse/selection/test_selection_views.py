"""The same selection as a density, a dense mask, a block mask and lists of tiles."""

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn.attention.flex_attention import create_mask, flex_attention

import mm_sparse as mms
from mm_sparse import Modality, Scores, Selection, SparseConfig, TokenLayout
from mm_sparse.integrations.mask_spans import layout_from_spans
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
)
from tests.support.selections import Batch, keep, kept_units, one_row

ROWS = {"mixed": MIXED, "packed": PACKED, "hole": HOLE, "short-segments": SHORT, "text": TEXT}


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


def test_queries_of_padding_that_see_keys_are_of_no_modality() -> None:
    span = torch.tensor([0, 80], dtype=torch.int32).expand(1, 160, 2)
    valid = torch.arange(160)[None] < 80
    kinds = torch.full((1, 160), int(Modality.AUDIO), dtype=torch.int8)
    layout = layout_from_spans(span, valid, 0, kinds)
    config = SparseConfig(tile=64, ratio=0.4, sinks=0, window=0)
    plan = layout.plan(config, num_query_heads=1, num_kv_heads=1)
    assert (plan.tile_modality == -1).any()
    values = torch.rand(1, 1, plan.tiles.shape[1], plan.units.shape[1])
    chosen = mms.select(values, layout, config)
    assert set(chosen.density_by_modality()) == {(Modality.AUDIO, Modality.AUDIO)}
    mask = chosen.to_dense_mask()
    assert chosen.density() == pytest.approx(mask.sum().item() / (160 * 80))

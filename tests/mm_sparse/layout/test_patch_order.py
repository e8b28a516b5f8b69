"""Pictures in patch order: compact runs, nothing else changes, and everything maps back."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import mm_sparse as mms
from mm_sparse import SparseConfig, TokenLayout
from mm_sparse.analysis.overlays import kept_patches, kept_share
from mm_sparse.layout.patch_order import arrange, ordered_layout, patch_order, restore
from tests.support.layouts import FEW, batches, configs, random_qk, seen_batch, small_config

GRIDS = [(37, 37), (72, 72), (23, 41), (16, 37), (33, 95), (50, 66)]


def ordered(layout: TokenLayout, config: SparseConfig, **queries: int) -> TokenLayout:
    return ordered_layout(layout, config, **queries)


def spread(order: np.ndarray, width: int, size: int) -> float:
    """Root mean square distance of tokens from the middle of their run."""
    row, column = np.divmod(order, width)
    found = 0.0
    for at in range(0, len(order), size):
        for axis in (row[at : at + size], column[at : at + size]):
            found += ((axis - axis.mean()) ** 2).sum()
    return float(np.sqrt(found / len(order)))


@given(st.integers(1, 60), st.integers(1, 60))
@settings(FEW, max_examples=80)
def test_every_grid_has_an_order_of_all_its_patches(height: int, width: int) -> None:
    assert sorted(patch_order(height, width).tolist()) == list(range(height * width))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("size", "square"), [(4, 0.71), (16, 1.58), (64, 3.24), (128, 5.15)])
def test_runs_are_nearly_as_compact_as_squares_on_any_grid(
    grid: tuple[int, int], size: int, square: float
) -> None:
    height, width = grid
    found = spread(patch_order(height, width), width, size)
    assert found < 1.2 * square
    assert found < 0.85 * spread(np.arange(height * width), width, size)


@pytest.mark.parametrize("grid", [(8, 8), (24, 24), (72, 72), (64, 32), (16, 40)])
@pytest.mark.parametrize("size", [4, 16, 64])
def test_grids_that_squares_divide_are_cut_into_squares(grid: tuple[int, int], size: int) -> None:
    side = int(size**0.5)
    for run in patch_order(*grid).reshape(-1, size):
        row, column = np.divmod(run, grid[1])
        assert (np.ptp(row), np.ptp(column)) == (side - 1, side - 1)
        assert row.min() % side == column.min() % side == 0


MIXED = [("text", 9), ("image", (9, 11)), ("text", 12), ("image", (10, 7)), ("audio", 20)]


def test_only_pictures_move_and_only_within_their_segment() -> None:
    layout = TokenLayout.from_rows([MIXED, [("image", (12, 12))]])
    found = ordered(layout, small_config())
    order = found.order
    assert order is not None
    assert order.shape == (2, layout.length)
    want = torch.arange(layout.length)
    want[9:108] = 9 + torch.from_numpy(patch_order(9, 11).copy())
    want[120:190] = 120 + torch.from_numpy(patch_order(10, 7).copy())
    assert order[0].equal(want)
    assert order[1, :144].equal(torch.from_numpy(patch_order(12, 12).copy()))
    assert order[1, 144:].equal(torch.arange(144, layout.length))
    for name in ("modality", "segment", "document"):
        assert getattr(found, name).equal(getattr(layout, name))
    assert ordered(layout, small_config()) is found
    assert ordered(found, small_config()) is found
    assert layout.order is None


def test_rows_that_agree_share_an_order() -> None:
    found = ordered(TokenLayout.from_spans(MIXED, batch=3), small_config())
    assert found.order is not None
    assert found.order.shape == (1, found.length)
    moved = found.to("cpu")
    assert moved.order is not None
    assert moved.memo is not found.memo


@pytest.mark.parametrize(
    ("config", "moves"),
    [
        (small_config(), True),
        (small_config(causal=False), True),
        (small_config(bidirectional=()), False),
        (small_config(bidirectional=(), causal=False), True),
        (small_config(patch_order=False), False),
    ],
    ids=["bidirectional", "encoder", "causal", "encoder-too", "off"],
)
def test_what_a_query_sees_in_part_stays(config: SparseConfig, moves: bool) -> None:
    layout = TokenLayout.from_spans(MIXED)
    assert (ordered(layout, config) is not layout) == moves


def test_without_a_grid_or_with_a_part_of_a_picture_nothing_moves() -> None:
    config = small_config()
    plain = TokenLayout.from_spans([("text", 5), ("image", 99)])
    assert ordered(plain, config) is plain
    layout = TokenLayout.from_spans([("text", 5), ("image", (9, 11)), ("text", 4)])
    assert ordered(layout, config, num_queries=50, query_offset=58) is layout
    # A token that is generated would have all keys moved for itself.
    assert ordered(layout, config, num_queries=4, query_offset=104) is layout
    answer = TokenLayout.from_spans([("text", 5), ("image", (9, 11)), ("text", 9)])
    assert ordered(answer, config, num_queries=9, query_offset=104).order is not None
    # A window of a mask of the model's own ends inside the picture.
    low = torch.arange(108).sub(40).clamp(min=0)
    windowed = TokenLayout(
        layout.modality, layout.segment, layout.document, grids=layout.grids,
        span=torch.stack([low, torch.arange(1, 109)], -1)[None].to(torch.int32),
    )  # fmt: skip
    assert ordered(windowed, config) is windowed


@given(batches(), configs(patch_order=True))
@FEW
def test_the_same_pairs_are_seen_in_any_order(some: Any, config: SparseConfig) -> None:
    rows, side = some
    layout = TokenLayout.from_rows(rows, padding_side=side)
    found = ordered(layout, config)
    seen = seen_batch(rows, side, config)
    span = found.visible_span(config.causal, config.bidirectional)
    place = torch.arange(layout.length)
    by_place = (place >= span[..., :1]) & (place < span[..., 1:]) & found.valid[:, None]
    if found.order is not None:
        order = found.order.expand(layout.batch, -1)
        seen = seen.gather(1, order[..., None].expand_as(seen))
        seen = seen.gather(2, order[:, None].expand_as(seen))
    assert by_place.equal(seen)


@given(batches(), configs(ratio=0.3, top_p=None, tokens=None))
@FEW
def test_tokens_come_back_to_their_places(some: Any, config: SparseConfig) -> None:
    rows, side = some
    layout = TokenLayout.from_rows(rows, padding_side=side)
    found = ordered(layout, config)
    q, _ = random_qk(layout, 2)
    assert restore(arrange(q, found), found).equal(q)
    turned = arrange(q, found).transpose(1, 2)
    assert restore(turned, found, dim=1).equal(q.transpose(1, 2))


def heavy_patch(rows: int = 1) -> tuple[TokenLayout, Tensor, Tensor, Tensor, int]:
    """A picture of 16 x 16 patches behind 3 words; all queries look for one 4 x 4 patch of it."""
    layout = TokenLayout.from_spans([("text", 3), ("image", (16, 16))], batch=rows)
    wanted = torch.zeros(16, 16, dtype=torch.bool)
    wanted[8:12, 4:8] = True
    k = torch.zeros(rows, 1, 259, 4)
    k[:, :, 3:][:, :, wanted.flatten()] = 9.0
    v = torch.arange(259.0)[:, None].expand(rows, 1, 259, 4).contiguous()
    return layout, torch.ones(rows, 2, 259, 4), k, v, int(wanted.flatten().nonzero()[0]) + 3


ONE = SparseConfig(
    tokens=16, tile=64, unit=16, causal=False, sinks=0, window=0, dense_below=0, query_pools=1
)


def test_a_square_is_one_unit_and_its_values_come_from_the_right_patches() -> None:
    layout, q, k, v, _ = heavy_patch()
    out = mms.sparse_attention(q, k, v, layout=layout, config=ONE)
    square = v[0, 0, 3:, 0].view(16, 16)[8:12, 4:8]
    torch.testing.assert_close(out, square.mean().expand_as(out))


def test_kept_patches_are_drawn_where_they_are_in_the_picture() -> None:
    layout, q, k, _, _ = heavy_patch()
    found = ordered(layout, ONE)
    q, k = arrange(q, found), arrange(k, found)
    chosen = mms.select(mms.PooledScorer()(q, k, layout=found, config=ONE), found, ONE)
    shares = kept_patches(chosen, [7, 100], torch.rand(3, 32, 32), (16, 16))["attention"]
    want = torch.zeros(16, 16)
    want[8:12, 4:8] = 1
    assert shares.equal(want)


def test_kept_shares_are_of_the_tile_that_holds_the_patch() -> None:
    layout = TokenLayout.from_rows([[("image", (16, 16))], [("image", (16, 8)), ("text", 128)]])
    config = small_config(causal=False, ratio=0.3, sinks=0, window=0)
    q, k = random_qk(layout)
    found = ordered(layout, config)
    scores = mms.PooledScorer()(arrange(q, found), arrange(k, found), layout=found, config=config)
    chosen = mms.select(scores, found, config)
    mask = chosen.to_dense_mask().float()
    for row in (0, 1):
        assert found.order is not None
        raster = torch.zeros(256, 256)
        raster[found.order[row][:, None], found.order[row][None]] = mask[row, 0]
        for token in (0, 10, 100, 200):
            assert kept_share(chosen, [token], row).equal(raster[token])


@given(batches(), configs(ratio=1.0, top_p=None, tokens=None))
@FEW
def test_the_whole_is_dense_attention_with_its_gradients(some: Any, config: SparseConfig) -> None:
    rows, side = some
    layout = TokenLayout.from_rows(rows, padding_side=side)
    q, k = random_qk(layout, 2)
    v = random_qk(layout, seed=1)[1]
    tensors = [x.double().requires_grad_() for x in (q, k, v)]
    out = mms.sparse_attention(*tensors, layout=layout, config=config)
    mask = seen_batch(rows, side, config)[:, None].expand(-1, 2, -1, -1)
    want = mms.attention_reference(*tensors, mask=mask)
    close = {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(out, want, **close)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    if not out.numel():
        return
    for a, b in zip(*(torch.autograd.grad(x, tensors, dout) for x in (out, want)), strict=True):
        torch.testing.assert_close(a, b, **close)


def test_patches_that_see_different_keys_keep_what_each_sees() -> None:
    plain = TokenLayout.from_spans([("image", (9, 11)), ("text", 12)])
    span = torch.tensor([0, 111]).repeat(1, 111, 1).to(torch.int32)
    span[:, :99:3, 1] = 99
    span[:, 5] = 0
    layout = TokenLayout(
        plain.modality, plain.segment, plain.document, grids=plain.grids, span=span
    )
    config = small_config(ratio=1.0)
    assert ordered(layout, config).order is not None
    q, k = random_qk(layout, 2)
    key = torch.arange(111)
    mask = (key >= span[..., :1]) & (key < span[..., 1:])
    out = mms.sparse_attention(q, k, k, layout=layout, config=config)
    want = mms.attention_reference(q, k, k, mask=mask[:, None].expand(-1, 2, -1, -1))
    torch.testing.assert_close(out, want)


def test_later_queries_find_a_picture_in_order() -> None:
    layout = TokenLayout.from_spans([("text", 6), ("image", (9, 11)), ("text", 40)])
    config = small_config(ratio=1.0)
    q, k = random_qk(layout, 2)
    whole = mms.sparse_attention(q, k, k, layout=layout, config=config)
    late = mms.sparse_attention(q[:, :, 105:], k, k, layout=layout, config=config)
    torch.testing.assert_close(late, whole[:, :, 105:])
    first = q[:, :, 6:120]
    part = mms.sparse_attention(first, k, k, layout=layout, config=config, query_offset=6)
    torch.testing.assert_close(part, whole[:, :, 6:120])


def test_an_ordered_layout_takes_and_gives_tokens_in_its_order() -> None:
    layout, q, k, v, _ = heavy_patch(2)
    q = q + random_qk(layout, 2, dim=4)[0]
    want = mms.sparse_attention(q, k, v, layout=layout, config=ONE)
    found = ordered(layout, ONE)
    given = [arrange(x, found) for x in (q, k, v)]
    out = mms.sparse_attention(*given, layout=found, config=ONE)
    assert restore(out, found).equal(want)


def test_second_derivatives_pass_through_the_order() -> None:
    found = ordered(TokenLayout.from_spans([("image", (3, 5))]), small_config())
    x = torch.randn(2, 1, 15, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: arrange(x, found), x)
    assert torch.autograd.gradgradcheck(lambda x: restore(arrange(x, found) ** 3, found), x)


def test_copies_keep_the_order() -> None:
    layout = ordered(TokenLayout.from_spans(MIXED), small_config())
    for twin in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert twin.order is not None
        assert twin.order.equal(layout.order)

"""Videos in patch order: runs that are compact in time and space, and frames in causal text."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import mm_sparse as mms
from mm_sparse import Modality, SparseConfig, TokenLayout
from mm_sparse.layout.patch_order import ordered_layout, patch_order, restore
from tests.support.layouts import FEW, random_qk, small_config

RUNS = (128, 64, 32, 16, 4)
# Sides of the most compact run of each size.
COMPACT = {4: (1, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8)}
# VideoMAE's and ViViT's, and some that no power of two divides.
GRIDS = [(8, 14, 14), (16, 14, 14), (7, 13, 15), (5, 9, 31), (3, 27, 27), (10, 18, 32)]
ENCODER = small_config(causal=False)


def reference(sides: tuple[int, int, int]) -> list[int]:
    """The rule, with lists: halve across the longest side until a part is one run."""

    def halved(part: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        size = next((size for size in RUNS if size < len(part)), None)
        if size is None:
            return part
        spans = [max(line) - min(line) for line in zip(*part, strict=True)]
        axis = spans.index(max(spans))
        part = sorted(part, key=lambda place: (place[axis], place))
        runs = -(-len(part) // size)

        def badness(cut: int) -> tuple[bool, bool, float]:
            through = part[cut - 1][axis] == part[cut][axis]
            return through, (part[cut][axis] - part[0][axis]) % 4 != 0, abs(cut - len(part) / 2)

        cuts = [n * size for n in range(-(-runs // 3), max(2 * runs // 3, 1) + 1)]
        cut = min(cuts, key=badness)
        return halved(part[:cut]) + halved(part[cut:])

    places = halved([tuple(place) for place in np.ndindex(*sides)])
    return [int(np.ravel_multi_index(place, sides)) for place in places]


def spread(order: np.ndarray, sides: tuple[int, ...], size: int) -> float:
    """Root mean square distance of tokens from the middle of their run."""
    found = 0.0
    for axis in np.unravel_index(order, sides):
        for at in range(0, len(order), size):
            run = axis[at : at + size]
            found += ((run - run.mean()) ** 2).sum()
    return float(np.sqrt(found / len(order)))


@given(st.integers(2, 9), st.integers(1, 12), st.integers(1, 12))
@settings(FEW, max_examples=60)
def test_the_order_is_that_of_the_rule(frames: int, height: int, width: int) -> None:
    order = patch_order(frames, height, width).tolist()
    assert order == reference((frames, height, width))
    assert sorted(order) == list(range(frames * height * width))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", RUNS)
def test_runs_are_nearly_as_compact_as_boxes(grid: tuple[int, int, int], size: int) -> None:
    found = spread(patch_order(*grid), grid, size)
    box = COMPACT[size]
    assert found < 1.25 * spread(np.arange(size), box, size)
    assert found < 0.8 * spread(np.arange(np.prod(grid)), grid, size)


@pytest.mark.parametrize("grid", [(8, 8, 8), (32, 16, 16), (4, 8, 16)])
@pytest.mark.parametrize("size", RUNS)
def test_grids_that_boxes_divide_are_cut_into_boxes(grid: tuple[int, int, int], size: int) -> None:
    for run in patch_order(*grid).reshape(-1, size):
        sides = tuple(int(np.ptp(axis)) + 1 for axis in np.unravel_index(run, grid))
        assert sides == COMPACT[size]


def test_one_frame_is_ordered_like_an_image() -> None:
    assert (patch_order(1, 9, 11) == patch_order(9, 11)).all()


def test_an_encoder_moves_a_video_as_a_whole() -> None:
    rows = [[("text", 3), ("video", (3, 5, 7)), ("text", 4)], [("video", (4, 4, 7))]]
    layout = TokenLayout.from_rows(rows, "left")
    found = ordered_layout(layout, ENCODER)
    assert found.order is not None
    assert found.order[0, 3:108].equal(3 + torch.from_numpy(patch_order(3, 5, 7).copy()))
    assert found.order[1].equal(torch.from_numpy(patch_order(4, 4, 7).copy()))
    # Units are to reach over frames, so the whole is one segment there.
    assert [int(row.unique().numel()) for row in found.segment] == [3, 1]
    assert layout.segment[1].unique().numel() == 4
    plan = found.plan(ENCODER, num_query_heads=1, num_kv_heads=1)
    assert plan.units[1, :7, 1].tolist() == [16] * 7


def test_a_video_that_is_one_segment_moves_too() -> None:
    kinds = torch.full((1, 60), int(Modality.VIDEO), dtype=torch.int8)
    zero = torch.zeros(1, 60, dtype=torch.int32)
    layout = TokenLayout(kinds, zero, zero, grids=({0: (3, 4, 5)},))
    found = ordered_layout(layout, ENCODER)
    assert found.order is not None
    assert found.order[0].equal(torch.from_numpy(patch_order(3, 4, 5).copy()))
    assert found.segment.equal(zero)
    causal = small_config(causal=True, bidirectional=())
    assert ordered_layout(layout, causal) is layout


def test_frames_move_by_themselves_in_causal_text() -> None:
    layout = TokenLayout.from_spans([("text", 5), ("video", (2, 6, 7)), ("text", 4)])
    found = ordered_layout(layout, small_config())
    frame = torch.from_numpy(patch_order(6, 7).copy())
    want = torch.arange(93)
    want[5:47], want[47:89] = 5 + frame, 47 + frame
    assert found.order is not None
    assert found.order[0].equal(want)
    assert found.segment.equal(layout.segment)
    assert ordered_layout(layout, small_config(bidirectional=(Modality.IMAGE,))) is layout


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("patched", [True, False])
def test_everything_kept_is_full_attention(causal: bool, patched: bool) -> None:
    layout = TokenLayout.from_rows(
        [[("text", 5), ("video", (3, 5, 7)), ("text", 9)], [("video", (2, 4, 5)), ("video", 30)]],
        "left",
    )
    config = small_config(ratio=1.0, causal=causal, patch_order=patched)
    q, k = random_qk(layout, 2)
    span = layout.visible_span(config.causal, config.bidirectional)
    key = torch.arange(layout.length)
    mask = (key >= span[..., :1]) & (key < span[..., 1:]) & layout.valid[:, None]
    out = mms.sparse_attention(q, k, k, layout=layout, config=config)
    want = mms.attention_reference(q, k, k, mask=mask[:, None].expand(-1, 2, -1, -1))
    torch.testing.assert_close(out, want)


def test_a_tile_finds_a_moving_patch_with_one_budget() -> None:
    """Queries look for 4 x 4 x 4 tokens: 64 keys hold them in this order, and not by frames."""
    grid = (8, 8, 8)
    layout = TokenLayout.from_spans([("video", grid)])
    wanted = torch.zeros(grid, dtype=torch.bool)
    wanted[4:8, 0:4, 4:8] = True
    k = torch.zeros(1, 1, 512, 4)
    k[0, 0, wanted.flatten()] = 9.0
    config = SparseConfig(
        tokens=64, tile=64, unit=64, causal=False, sinks=0, window=0, dense_below=0, query_pools=1
    )
    v = wanted.flatten().float()[None, None, :, None].expand(1, 1, 512, 4).contiguous()
    out = mms.sparse_attention(torch.ones(1, 1, 512, 4), k, v, layout=layout, config=config)
    assert out.eq(1).all()
    found = ordered_layout(layout, config)
    assert restore(v[:, :, found.order[0]], found).equal(v)  # type: ignore[index]

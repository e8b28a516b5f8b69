"""Layouts for tests: named ones, generated ones, and what their tokens see, token by token.

B batch, H query heads, K KV heads, N query tokens, M key tokens, T tiles, U units
"""

from math import prod
from typing import Any

import torch
from hypothesis import settings, strategies as st
from torch import Tensor

import mm_sparse as mms
from mm_sparse.layout.plan import Plan

Row = list[tuple]

FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)

MIXED: Row = [("text", 21), ("image", (7, 9)), ("text", 33), ("audio", 50), ("text", 5)]
TEXT: Row = [("text", 70)]
PACKED: Row = [
    ("text", 40, 0),
    ("image", (4, 5), 0),
    ("text", 3, 1),
    ("text", 2, 2),
    ("audio", 37, 2),
]
FRAMES: Row = [("text", 9), ("video", (3, 5, 7)), ("text", 6), ("video", 40), ("image", (6, 6))]
HOLE: Row = [("text", 25), ("pad", 9), ("image", 20), ("pad", 1), ("text", 18)]
SHORT: Row = [("text", 1), ("image", 1), ("audio", 2)] * 12

BATCHES: dict[str, tuple[list[Row], str]] = {
    "text": ([TEXT], "right"),
    "texts": ([TEXT, TEXT], "right"),
    "picture": ([[("image", (9, 11))]], "right"),
    "mixed": ([MIXED, MIXED], "right"),
    "padded-left": ([MIXED, TEXT], "left"),
    "padded-right": ([MIXED, TEXT], "right"),
    "packed": ([PACKED], "right"),
    "hole": ([HOLE], "right"),
    "video": ([FRAMES, [("video", (5, 4, 6))]], "left"),
    "short-segments": ([SHORT], "right"),
}
IDS = list(BATCHES)
# Query heads and KV heads.
GROUPS = [(1, 1), (8, 1), (6, 2)]

KINDS = {"text": 0, "image": 1, "audio": 2, "video": 3}


@st.composite
def rows(draw: st.DrawFn, most: int = 40) -> Row:
    """A row of spans: several documents, pictures and videos with and without a grid, holes of
    padding."""
    row: Row = []
    document = 0
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(
            st.sampled_from(["text", "text", "image", "grid", "audio", "video", "frames", "pad"])
        )
        document += draw(st.integers(0, 3)) == 0
        if kind == "pad":
            row.append(("pad", draw(st.integers(1, 9))))
        elif kind == "grid":
            row.append(("image", draw(st.tuples(st.integers(1, 6), st.integers(1, 6))), document))
        elif kind == "frames":
            sides = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
            row.append(("video", draw(sides), document))
        else:
            row.append((kind, draw(st.integers(0, most)), document))
    return row


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Row], str]:
    """Rows of a batch and the side that is padded."""
    return draw(st.lists(rows(), min_size=1, max_size=2)), draw(st.sampled_from(["left", "right"]))


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> mms.SparseConfig:
    """Small sinks and windows, every budget, every tile and unit."""
    kinds = st.sampled_from(list(mms.Modality))
    # Shares that float32 holds exactly, so that a slow loop rounds as the code does.
    shares = st.integers(0, 21).map(lambda x: x / 64)
    budget = draw(
        st.one_of(
            st.builds(lambda x: {"ratio": x}, st.floats(0.02, 1.0)),
            st.builds(lambda x: {"tokens": x}, st.integers(1, 120)),
            st.builds(lambda x: {"top_p": x}, st.floats(0.02, 1.0)),
        )
    )
    fields = {
        "unit": draw(st.sampled_from([16, 32, 64])),
        "tile": draw(st.sampled_from([64, 128])),
        "causal": draw(st.booleans()),
        "patch_order": draw(st.booleans()),
        "bidirectional": tuple(draw(st.sets(kinds, max_size=3))),
        "sinks": draw(st.integers(0, 20)),
        "window": draw(st.integers(0, 30)),
        "modality_floor": draw(st.one_of(shares, st.dictionaries(kinds, shares))),
        "dense_below": 0,
        **budget,
    }
    return mms.SparseConfig(**{**fields, **fixed})


def tokens_of(row: Row) -> list[tuple[str, int, int]]:
    """Kind, segment and document of every token, without the padding of the batch."""
    tokens = []
    number = 0
    for item in row:
        kind, size, document = (*item, 0)[:3]
        count = size if isinstance(size, int) else prod(size)
        frames = size[0] if kind == "video" and not isinstance(size, int) else 1
        for frame in range(frames):
            own = (kind, number + frame, -1 if kind == "pad" else document)
            tokens += [own] * (count // frames)
        number += frames
    return tokens


def seen_pairs(
    row: Row,
    length: int,
    side: str = "right",
    causal: bool = True,
    bidirectional: tuple[mms.Modality, ...] = (),
) -> Tensor:
    """(M, M) bool by the definition of words: same document, not padding, not ahead in time
    unless both tokens are of one segment whose modality is bidirectional."""
    tokens = tokens_of(row)
    pad = [("pad", -1, -1)] * (length - len(tokens))
    tokens = pad + tokens if side == "left" else tokens + pad
    both_ways = {kind for kind, number in KINDS.items() if number in map(int, bidirectional)}
    seen = torch.zeros(length, length, dtype=torch.bool)
    for i, (kind, number, document) in enumerate(tokens):
        for j, (_, other_number, other_document) in enumerate(tokens):
            if document < 0 or other_document != document:
                continue
            seen[i, j] = not causal or j <= i or (number == other_number and kind in both_ways)
    return seen


def seen_batch(some: list[Row], side: str, config: mms.SparseConfig) -> Tensor:
    """(B, M, M) bool."""
    length = max(len(tokens_of(row)) for row in some)
    return torch.stack(
        [seen_pairs(row, length, side, config.causal, config.bidirectional) for row in some]
    )


def members(table: Tensor, length: int) -> Tensor:
    """(B, P, 2) starts and lengths -> (B, P, length) bool."""
    token = torch.arange(length)
    return (token >= table[..., :1]) & (token < table[..., :1] + table[..., 1:])


def sees_unit(plan: Plan, seen: Tensor) -> Tensor:
    """(B, T, U) bool: some query of the tile sees some key of the unit, from (B, N, M) pairs."""
    tiles, units = members(plan.tiles, plan.num_queries), members(plan.units, plan.layout.length)
    return torch.einsum("btn,bnm,bum->btu", tiles.float(), seen.float(), units.float()) > 0


def random_qk(
    layout: mms.TokenLayout, heads: int = 1, kv_heads: int = 1, dim: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """q (B, H, M, D) and k (B, K, M, D)."""
    make = torch.Generator().manual_seed(seed)
    shape = (layout.length, dim)
    q = torch.randn(layout.batch, heads, *shape, generator=make)
    return q, torch.randn(layout.batch, kv_heads, *shape, generator=make)


def small_config(**fields: Any) -> mms.SparseConfig:
    """Small enough to leave something out of short rows; never dense unless asked."""
    return mms.SparseConfig(**{"tile": 64, "sinks": 4, "window": 8, "dense_below": 0, **fields})


def layout_of(name: str) -> mms.TokenLayout:
    some, side = BATCHES[name]
    return mms.TokenLayout.from_rows(some, padding_side=side)


def inputs(
    name: str, heads: int = 3, kv_heads: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[mms.TokenLayout, Tensor, Tensor, Tensor]:
    """A layout, and q, k, v that want gradients."""
    layout = layout_of(name)
    q, k = random_qk(layout, heads, kv_heads)
    _, v = random_qk(layout, heads, kv_heads, seed=1)
    return layout, *(x.to(dtype).requires_grad_() for x in (q, k, v))


def assert_equal_where_visible(got: Tensor, want: Tensor, plan: Plan, tolerance: float) -> None:
    """What a tile does not see may hold anything."""
    seen = plan.visible[:, None].expand_as(got)
    torch.testing.assert_close(
        got[seen].double(), want[seen].double(), rtol=tolerance, atol=tolerance
    )

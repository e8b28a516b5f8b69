"""Tokens of an image or video in an order whose runs are compact patches of its grid.

B batch, H heads, N query tokens, M key tokens, D head dim
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_sparse.config import SparseConfig
from mm_sparse.layout.call_layout import CallLayout
from mm_sparse.layout.parsing import Grid, frame_starts
from mm_sparse.layout.token_layout import TokenLayout

# Sizes that runs are cut to: tiles, units, and the parts of both that scorers look at.
RUNS = (128, 64, 32, 16, 4)
# Cuts between lines that lie so many apart leave squares, or cubes, of 64 tokens whole.
SIDES = {2: 8, 3: 4}
RUN_BYTES = 16
# Keys for a query up to which images move.
FEWEST = 16


@lru_cache(maxsize=64)
def patch_order(*sides: int) -> np.ndarray:
    """Raster positions of a (height, width) or (frames, height, width) grid in patch order.

    Every aligned run of 128, 64, 32, 16 or 4 tokens is a compact patch on a grid of any size, and
    only the last is short: 8 x 16 to 2 x 2 of an image, 4 x 4 x 8 to 1 x 2 x 2 of a video, where
    the grid allows. The grid is halved across its longest side, again and again, so that all parts
    but the last hold whole runs.

    Returns:
        int64, one for each token, read only.

    Example:
        >>> patch_order(8, 14, 14)[:16]  # a unit of a video: 2 frames, 2 rows, 4 columns
    """
    if len(sides) == 3 and sides[0] == 1:
        return patch_order(*sides[1:])
    axes = np.indices(sides).reshape(len(sides), -1)
    done: list[np.ndarray] = []
    rest = [np.arange(axes.shape[1])]
    while rest:
        part = rest.pop()
        size = next((size for size in RUNS if size < len(part)), None)
        if size is None:
            done.append(part)
            continue
        places = axes[:, part]
        along = places[np.ptp(places, axis=1).argmax()]
        # The last key counts most; of equal ones tokens stay in raster order.
        order = np.lexsort((*places[::-1], along))
        part, cut = part[order], _cut(along[order], size, SIDES[len(sides)])
        rest += [part[cut:], part[:cut]]
    order = np.concatenate(done)
    order.flags.writeable = False
    return order


def _cut(line: np.ndarray, size: int, side: int) -> int:
    """Where to halve tokens that lie on these lines: after whole runs, best between lines."""
    runs = -(-len(line) // size)
    cuts = np.arange(-(-runs // 3), max(2 * runs // 3, 1) + 1) * size
    ragged = line[cuts - 1] == line[cuts]
    uneven = (line[cuts] - line[0]) % side != 0
    best = np.lexsort((abs(cuts - len(line) / 2), uneven, ragged))
    return int(cuts[best[0]])


def ordered_layout(
    layout: TokenLayout,
    config: SparseConfig,
    *,
    num_queries: int | None = None,
    query_offset: int | None = None,
) -> TokenLayout:
    """The layout of the same tokens in patch order, or `layout` itself where nothing moves.

    An image moves if `config.patch_order` says so, its grid is known, every query sees all of it
    or none (in causal text, an image that does not see itself in both directions stays), and the
    N queries are all of its tokens or none of them, and are not few, as in decoding. Its tokens
    keep the places of its segment. A video moves as a whole, and is one segment then, or else by
    frames, each like an image.
    `num_queries` and `query_offset` are those of `TokenLayout.plan`.

    Returns:
        A layout whose `order` is set; tokens for it come from `arrange`. Made once per layout.
    """
    if not config.patch_order or layout.order is not None or not any(layout.grids):
        return layout
    count = layout.length if num_queries is None else num_queries
    if count * FEWEST < layout.length:
        # Moving all keys and values for a few queries costs more than what they then keep.
        return layout
    first = layout.first_query(count, query_offset)
    key = "order", config.causal, config.bidirectional, count, first
    if key not in layout.memo:
        layout.memo[key] = _ordered(layout, config, first, first + count)
    return layout.memo[key]


def _ordered(layout: TokenLayout, config: SparseConfig, first: int, end: int) -> TokenLayout:
    seen = layout.visible_span(config.causal, config.bidirectional)
    # (B, M + 1): some query sees the key here and not the one before, or the other way round.
    edges = torch.zeros(layout.batch, layout.length + 1, dtype=torch.bool, device=layout.device)
    seen = torch.where(seen[..., :1] < seen[..., 1:], seen, 0)
    edges.scatter_(1, seen.long().flatten(1), True)
    moves = [
        _moves(*row, first, end)
        for row in zip(
            layout.grids, layout.segment.tolist(), layout.document.tolist(), edges.tolist(),
            strict=True,
        )
    ]  # fmt: skip
    if not any(moves):
        return layout
    same = all(row == moves[0] for row in moves)
    rows = []
    for images in moves[:1] if same else moves:
        order = np.arange(layout.length)
        for start, sides in images:
            order[start : start + prod(sides)] = start + patch_order(*sides)
        rows.append(torch.from_numpy(order))
    order = torch.stack(rows).to(layout.device)
    span = layout.span
    if span is not None:
        span = span.gather(1, order[..., None].expand(layout.batch, -1, 2))
    segment = layout.segment
    videos = [[move for move in row if len(move[1]) == 3] for row in moves]
    if any(videos):
        segment = segment.clone()
        for row, found in enumerate(videos):
            for start, sides in found:
                segment[row, start : start + prod(sides)] = segment[row, start].clone()
    return replace(layout, segment=segment, span=span, order=order, memo={})


def _moves(
    grids: dict[int, Grid],
    segment: list[int],
    document: list[int],
    edges: list[bool],
    first: int,
    end: int,
) -> list[tuple[int, Grid]]:
    """Start and sides of images, videos and frames of a row that can be put in another order."""

    def moves(start: int, count: int, segments: list[int]) -> bool:
        stop = start + count
        whole = segment[start:stop] == segments
        whole = whole and document[start:stop] == [max(document[start], 0)] * count
        apart = stop <= first or start >= end or (first <= start and stop <= end)
        return whole and apart and not any(edges[start + 1 : stop])

    found: list[tuple[int, Grid]] = []
    for number, sides in sorted(grids.items()):
        if number not in segment:
            continue
        start, count = segment.index(number), prod(sides)
        # Frames of a video are segments, or all of it is one.
        starts = frame_starts(start, sides)
        by_frame = [number + i for i in range(len(starts)) for _ in range(count // len(starts))]
        if moves(start, count, [number] * count) or moves(start, count, by_frame):
            found.append((start, sides))
        elif len(starts) > 1:
            size = count // len(starts)
            found += [
                (at, sides[1:])
                for i, at in enumerate(starts)
                if moves(at, size, [number + i] * size)
            ]
    return found


class _Take(torch.autograd.Function):
    """Tokens by index along a dimension; the gradient comes back by the inverse, not by adding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(index, inverse)
        ctx.dim = dim
        return _take(x, index, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        index, inverse = ctx.saved_tensors
        return _Take.apply(grads[0], inverse, index, ctx.dim), None, None, None


def _take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    moved = _in_runs(x)
    if len(index) == 1:
        return moved.index_select(dim, index[0]).view(x.dtype)
    shape = [1] * x.dim()
    shape[0], shape[dim] = index.shape
    return moved.gather(dim, index.view(shape).expand_as(moved)).view(x.dtype)


def _in_runs(x: Tensor) -> Tensor:
    """The same memory as numbers of 16 bytes, where it can be: torch looks each number's place up.

    A compiler makes a loop of its own, and has none for such numbers.
    """
    per = RUN_BYTES // x.element_size()
    sizes = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    if torch.compiler.is_compiling() or x.stride(-1) != 1 or any(size % per for size in sizes):
        return x
    return x.view(torch.complex128)


def _taken(x: Tensor, index: Tensor, inverse: Tensor, dim: int) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Take.apply(x, index, inverse, dim)
    return _take(x, index, dim)


def arrange(x: Tensor, layout: TokenLayout, first: int = 0, *, dim: int = 2) -> Tensor:
    """Tokens of the sequence from `first` on, along `dim`, in the order of `layout`."""
    if layout.order is None:
        return x
    return _taken(x, *_window(layout, layout.order, first, x.shape[dim]), dim)


def restore(x: Tensor, layout: TokenLayout, first: int = 0, *, dim: int = 2) -> Tensor:
    """Inverse of `arrange`; tokens lie along `dim`."""
    if layout.order is None:
        return x
    index, inverse = _window(layout, layout.order, first, x.shape[dim])
    return _taken(x, inverse, index, dim)


def in_patch_order(
    placed: CallLayout, config: SparseConfig, q: Tensor, k: Tensor, v: Tensor
) -> tuple[CallLayout, Tensor, Tensor, Tensor]:
    """The call of a layer, q (B, H, N, D), k and v (B, K, M, D), in the order of its layout."""
    layout = ordered_layout(
        placed.layout, config, num_queries=q.shape[2], query_offset=placed.first
    )
    if layout is placed.layout:
        return placed, q, k, v
    q, k, v = arrange(q, layout, placed.first), arrange(k, layout), arrange(v, layout)
    return replace(placed, layout=layout), q, k, v


def _window(layout: TokenLayout, order: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """(B or 1, N) places among the queries, and their inverse; made once."""
    key = "window", first, count
    if key not in layout.memo:
        index = order[:, first : first + count] - first
        layout.memo[key] = index, index.argsort(1)
    return layout.memo[key]

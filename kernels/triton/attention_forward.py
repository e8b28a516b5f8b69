"""Forward: exact softmax attention of every tile on the units in its list.

B batch, H query heads, K KV heads, G = H / K, N query tokens, M key tokens, D head dim,
T tiles, U units, L list length
"""

# Triton launches are subscripts of a jit function, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_sparse.kernels.block_lists import BlockLists
from mm_sparse.kernels.cached_launch import launch
from mm_sparse.kernels.device import generation
from mm_sparse.kernels.paged.pages import Pages, page_arguments, strides_of_keys
from mm_sparse.kernels.sizes import all_whole, new_output, next_power_of_2
from mm_sparse.kernels.triton.primitives import (
    COUNTS,
    LOG2E,
    describe,
    listed_units,
    load_rows,
    place_of_unit,
    row_span,
    softmax_step,
    tile_rows,
    unmasked_columns,
)


@triton.jit(do_not_specialize=COUNTS)
def _block_sparse_attention_fwd(
    Q, K, V, Kd, Vd, Out, Lse, Tiles, Units, Span, Index, Count, PageTable,
    scale, num_queries, num_tiles, num_units, list_length, kv_heads, stride_pages,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    CUT_COLS: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr, REGULAR: tl.constexpr, REGULAR_TILES: tl.constexpr,
    PRECISION: tl.constexpr, PAGE_UNITS: tl.constexpr, PAGE_STRIDE: tl.constexpr,
):  # fmt: skip
    # Late tiles of causal text have the longest lists: they start first.
    t = (num_tiles - 1 - tl.program_id(0) // SPLITS).to(tl.int64)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    token, g, exists = tile_rows(
        Tiles, (batch * num_tiles + t, t), tl.program_id(0) % SPLITS * ROWS, GROUP, ROWS, TOKENS,
        REGULAR_TILES,
    )  # fmt: skip
    low, high = row_span(Span, token, exists, num_queries, batch)
    q_base = Q + batch * stride_qb + head * GROUP * stride_qh
    q = load_rows(q_base, token, g, exists, stride_qh, stride_qn, False, D, BLOCK_D)
    Kb = K + batch * stride_kb + head * stride_kh
    Vb = V + batch * stride_vb + head * stride_vh
    Ub = Units + batch * num_units * 2
    PAGED: tl.constexpr = PAGE_UNITS > 0
    if PAGED:
        PageTable += batch * stride_pages
    row = (batch * kv_heads + head) * num_tiles + t
    Ib = Index + row * list_length
    count = tl.load(Count + row)
    scale2 = scale * LOG2E
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    begin, end = unmasked_columns(Ib, Ub, count, low, high, exists, UNIT, COLS, PAGED)
    # The next units are looked up a step ahead, so that loads of keys need not wait for them.
    ahead = listed_units(Ib, begin, count, UNIT, COLS)
    placed = place_of_unit(PageTable, ahead, PAGE_UNITS, PAGE_STRIDE)
    for first in range(begin, end, COLS):
        unit, place = ahead, placed
        ahead = listed_units(Ib, first + COLS, count, UNIT, COLS)
        placed = place_of_unit(PageTable, ahead, PAGE_UNITS, PAGE_STRIDE)
        top, total, acc = softmax_step(
            q, top, total, acc, Kd, Vd, Kb, Vb, Ub, unit, place, batch, head, first, count, low,
            high, scale2, stride_kn, stride_vn, False, REGULAR, UNIT, COLS, D, BLOCK_D, PRECISION,
            PAGED,
        )  # fmt: skip
    # What lies before `begin` and from `end` on is cut by the visible range of some row.
    cut = begin + tl.maximum(count * UNIT - end, 0)
    for i in range(0, cut, CUT_COLS):
        first = tl.where(i < begin, i, end + i - begin)
        unit = listed_units(Ib, first, count, UNIT, CUT_COLS)
        place = place_of_unit(PageTable, unit, PAGE_UNITS, PAGE_STRIDE)
        top, total, acc = softmax_step(
            q, top, total, acc, Kd, Vd, Kb, Vb, Ub, unit, place, batch, head, first, count, low,
            high, scale2, stride_kn, stride_vn, True, REGULAR, UNIT, CUT_COLS, D, BLOCK_D,
            PRECISION, PAGED,
        )  # fmt: skip
    seen = total != 0
    out = acc / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, top / LOG2E + tl.log(tl.where(seen, total, 1.0)), -float("inf"))
    dim = tl.arange(0, BLOCK_D)
    pointer = Out + batch * stride_ob + (head * GROUP + g)[:, None] * stride_oh
    pointer += token.to(tl.int64)[:, None] * stride_on + dim[None, :]
    tl.store(pointer, out.to(Out.dtype.element_ty), mask=exists[:, None] & (dim < D)[None, :])
    heads = (batch * kv_heads + head) * GROUP + g
    tl.store(Lse + heads * num_queries + token, lse, mask=exists)


@lru_cache(maxsize=4096)
def forward_blocks(
    rows: int, unit: int, head_dim: int, itemsize: int, major: int
) -> tuple[int, int, int, int]:
    """(rows, keys) of a block, warps and stages, as measured (docs/development/kernel-log.md).

    q, k, v fit in the shared memory of the GPU's generation.
    """
    width = max(next_power_of_2(head_dim), 16)
    if itemsize == 4:
        # Products of float32 run on the vector units, out of registers: small blocks.
        rows, cols, stages = min(rows, 32 if width > 128 else 64), 32, 1
    elif width <= 128:
        # Four warps and small blocks leave room for two programs on a multiprocessor.
        if width > 64 or unit == 64:
            return rows, 64, 4, 3 if width <= 64 and major in (9, 10) else 2
        return rows, 128, 4, 3 if major in (9, 10) else 2
    else:
        cols, stages = 32, 2
    return rows, cols, 8 if rows >= 64 else 4, stages


def block_sparse_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float,
    pages: Pages | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernel; arguments as in `reference.dense_mask`.

    With `pages`, k and v are all pages in memory as one row, of `flat_tokens`.

    Returns:
        out (B, H, N, D) in q's dtype, log-sum-exp (B, H, N) float32.
    """
    tiles, units, span, index, count, tile_tokens, unit, lead, tile_lead = lists
    batch, heads, num_queries, head_dim = q.shape
    kv_heads, num_tiles = k.shape[1], tiles.shape[1]
    group = heads // kv_heads
    rows = max(next_power_of_2(min(tile_tokens, num_queries) * group), 16)
    out = new_output(q)
    lse = q.new_empty(batch, heads, num_queries, dtype=torch.float32)
    all_rows, major = rows, generation(q)
    rows, cols, warps, stages = forward_blocks(rows, unit, head_dim, q.element_size(), major)
    block_d = max(next_power_of_2(head_dim), 16)
    regular = pages is not None or all_whole(lead, unit, k.shape[2])
    # A descriptor of pages would need to know that all sequences share them.
    whole = regular and cols <= unit and pages is None
    table, stride_pages, page_sizes = page_arguments(pages)
    launch(
        _block_sparse_attention_fwd, (num_tiles * (all_rows // rows), batch * kv_heads),
        q, k, v, *(describe(x, cols, block_d) if whole else None for x in (k, v)),
        out, lse, tiles, units, span, index, count, table,
        scale, num_queries, num_tiles, units.shape[1], index.shape[-1], kv_heads, stride_pages,
        *q.stride()[:3], *strides_of_keys(k, pages), *strides_of_keys(v, pages), *out.stride()[:3],
        GROUP=group, TOKENS=tile_tokens, ROWS=rows, COLS=cols, CUT_COLS=min(cols, 64),
        UNIT=unit, D=head_dim,
        BLOCK_D=block_d, SPLITS=all_rows // rows,
        REGULAR=regular, REGULAR_TILES=all_whole(tile_lead, tile_tokens, num_queries),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **page_sizes,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse

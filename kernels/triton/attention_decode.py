"""Forward for few queries: every list is cut into parts, whose results are merged.

Few tiles alone would leave most of the GPU idle (Flash-Decoding: Dao et al., 2023).

B batch, H query heads, K KV heads, G = H / K, N query tokens, M key tokens, D head dim,
T tiles, U units, L list length, S parts of a list
"""

# Triton launches are subscripts of a jit function, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_sparse.kernels.block_lists import BlockLists
from mm_sparse.kernels.cached_launch import launch
from mm_sparse.kernels.paged.pages import Pages, page_arguments, strides_of_keys
from mm_sparse.kernels.sizes import all_whole, cdiv, new_output, next_power_of_2
from mm_sparse.kernels.triton.primitives import (
    COUNTS,
    LOG2E,
    listed_units,
    load_rows,
    place_of_unit,
    row_span,
    softmax_step,
    tile_rows,
)

# Keys of the smallest part: below, merging costs more than it brings.
LEAST_KEYS = 256
# Rows of the largest tile that is cut: a float32 accumulator of more would not fit.
MOST_ROWS = 64


@triton.jit(do_not_specialize=COUNTS)
def _block_sparse_attention_split_kv(
    Q, K, V, Part, Weight, Tiles, Units, Span, Index, Count, PageTable,
    scale, num_queries, num_tiles, num_units, list_length, kv_heads, splits, keys_of_part,
    stride_pages, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, REGULAR: tl.constexpr,
    REGULAR_TILES: tl.constexpr, PRECISION: tl.constexpr, PAGE_UNITS: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
):  # fmt: skip
    """Attention of a tile on one part of its list, and the log-sum-exp that weighs it."""
    t = (tl.program_id(0) // splits).to(tl.int64)
    part = tl.program_id(0) % splits
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    token, g, exists = tile_rows(
        Tiles, (batch * num_tiles + t, t), 0, GROUP, ROWS, TOKENS, REGULAR_TILES
    )
    low, high = row_span(Span, token, exists, num_queries, batch)
    q_base = Q + batch * stride_qb + head * GROUP * stride_qh
    q = load_rows(q_base, token, g, exists, stride_qh, stride_qn, False, D, BLOCK_D)
    Kb = K + batch * stride_kb + head * stride_kh
    Vb = V + batch * stride_vb + head * stride_vh
    Ub = Units + batch * num_units * 2
    PAGED: tl.constexpr = PAGE_UNITS > 0
    if PAGED:
        PageTable += batch * stride_pages
    list_ = (batch * kv_heads + head) * num_tiles + t
    Ib = Index + list_ * list_length
    count = tl.load(Count + list_)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if PAGED:
        # Lists are as long as those of the longest sequence that there may be: what one holds is
        # shared among all parts.
        keys_of_part = (count * UNIT + splits - 1) // splits
        keys_of_part = (keys_of_part + COLS - 1) // COLS * COLS
    begin = part * keys_of_part
    end = tl.minimum(begin + keys_of_part, count * UNIT)
    for first in range(begin, end, COLS):
        unit = listed_units(Ib, first, count, UNIT, COLS)
        place = place_of_unit(PageTable, unit, PAGE_UNITS, PAGE_STRIDE)
        top, total, acc = softmax_step(
            q, top, total, acc, None, None, Kb, Vb, Ub, unit, place, batch, head, first, count,
            low, high, scale * LOG2E, stride_kn, stride_vn, True, REGULAR, UNIT, COLS, D, BLOCK_D,
            PRECISION, PAGED,
        )  # fmt: skip
    seen = total != 0
    total = tl.where(seen, total, 1.0)
    heads = (batch * kv_heads + head) * GROUP + g
    place = (heads * num_queries + token) * splits + part
    weight = tl.where(seen, top / LOG2E + tl.log(total), -float("inf"))
    tl.store(Weight + place, weight, mask=exists)
    dim = tl.arange(0, BLOCK_D)
    tl.store(
        Part + place[:, None] * D + dim[None, :], acc / total[:, None],
        mask=exists[:, None] & (dim < D)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _merge_splits(
    Part, Weight, Out, Lse, splits, heads, num_queries, stride_ob, stride_oh, stride_on,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One query of one head: the parts' mean by their weights, always in the same order."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    top = -float("inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, splits, WIDTH):
        part = first + tl.arange(0, WIDTH)
        there = part < splits
        weight = tl.load(Weight + row * splits + part, mask=there, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(weight, 0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        share = tl.exp(weight - shift)
        decay = tl.exp(top - shift)
        found = tl.load(
            Part + (row * splits + part)[:, None] * D + dim[None, :],
            mask=there[:, None] & (dim < D)[None, :], other=0.0,
        )  # fmt: skip
        acc = acc * decay + tl.sum(found * share[:, None], 0)
        total = total * decay + tl.sum(share, 0)
        top = new_top
    seen = total != 0
    total = tl.where(seen, total, 1.0)
    tl.store(Lse + row, tl.where(seen, top + tl.log(total), -float("inf")))
    pointer = Out + row // num_queries // heads * stride_ob
    pointer += row // num_queries % heads * stride_oh + row % num_queries * stride_on
    tl.store(pointer + dim, (acc / total).to(Out.dtype.element_ty), mask=dim < D)


def splits_of_lists(programs: int, keys: int, multiprocessors: int) -> int:
    """Parts that lists of up to `keys` keys are cut into, 1 if `programs` fill the GPU anyway."""
    if programs * 2 > multiprocessors:
        return 1
    return max(1, min(3 * multiprocessors // programs, keys // LEAST_KEYS))


def block_sparse_attention_split_kv(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, splits: int,
    pages: Pages | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `block_sparse_attention_fwd`, every list in `splits`."""
    tiles, units, span, index, count, tile_tokens, unit, lead, tile_lead = lists
    batch, heads, num_queries, head_dim = q.shape
    kv_heads, num_tiles, list_length = k.shape[1], tiles.shape[1], index.shape[-1]
    group = heads // kv_heads
    rows = max(next_power_of_2(min(tile_tokens, num_queries) * group), 16)
    block_d = max(next_power_of_2(head_dim), 16)
    wide = q.element_size() == 4 or block_d > 128
    cols = 32 if wide else 64
    keys_of_part = cdiv(cdiv(list_length * unit, splits), cols) * cols
    splits = cdiv(list_length * unit, keys_of_part)
    table, stride_pages, page_sizes = page_arguments(pages)
    out = new_output(q)
    lse = q.new_empty(batch, heads, num_queries, dtype=torch.float32)
    part = q.new_empty(batch, heads, num_queries, splits, head_dim, dtype=torch.float32)
    weight = q.new_empty(batch, heads, num_queries, splits, dtype=torch.float32)
    launch(
        _block_sparse_attention_split_kv, (num_tiles * splits, batch * kv_heads),
        q, k, v, part, weight, tiles, units, span, index, count, table,
        scale, num_queries, num_tiles, units.shape[1], list_length, kv_heads, splits, keys_of_part,
        stride_pages, *q.stride()[:3], *strides_of_keys(k, pages), *strides_of_keys(v, pages),
        GROUP=group, TOKENS=tile_tokens, ROWS=rows, COLS=cols, UNIT=unit, D=head_dim,
        BLOCK_D=block_d, REGULAR=pages is not None or all_whole(lead, unit, k.shape[2]),
        REGULAR_TILES=all_whole(tile_lead, tile_tokens, num_queries),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **page_sizes,
        num_warps=4, num_stages=1 if q.element_size() == 4 else 2 if wide else 3,
    )  # fmt: skip
    launch(
        _merge_splits, (batch * heads * num_queries,),
        part, weight, out, lse, splits, heads, num_queries, *out.stride()[:3], D=head_dim,
        BLOCK_D=block_d,
        WIDTH=min(next_power_of_2(splits), 16), num_warps=4,
    )  # fmt: skip
    return out, lse

"""Backward: dQ by tile over its units, dK and dV by unit over its tiles; no atomics.

B batch, H query heads, K KV heads, G = H / K, N query tokens, M key tokens, D head dim,
T tiles, U units, L list length
"""

# Triton launches are subscripts of a jit function, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_sparse.kernels.block_lists import BlockLists
from mm_sparse.kernels.device import generation
from mm_sparse.kernels.sizes import all_whole, next_power_of_2
from mm_sparse.kernels.triton.primitives import (
    COUNTS,
    LOG2E,
    describe,
    listed_units,
    load_block,
    load_keys,
    load_rows,
    row_span,
    tile_rows,
    unit_keys,
    unmasked_columns,
)
from mm_sparse.kernels.triton.transpose_lists import transpose_lists

# Keys of each head, sinks among them, whose gradients are begun before those of all others, and
# tiles of a piece of their lists, of which there are so many at most.
EARLY_KEYS = 64
PIECE = 32
MOST_PIECES = 8


@triton.jit
def _query_step(
    q, do, lse, delta, acc, Kd, Vd, Kb, Vb, Ub, unit, batch, head, first, count, low, high, scale2,
    stride_kn, stride_vn, MASKED: tl.constexpr, REGULAR: tl.constexpr, UNIT: tl.constexpr,
    COLS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    ALL: tl.constexpr = REGULAR and not MASKED
    key, exists = unit_keys(unit, Ub, first, count, UNIT, COLS, REGULAR)
    if ALL and Kd is not None:
        k = load_block(Kd, batch, head, unit * UNIT + first % UNIT, COLS, BLOCK_D)
    else:
        k = load_keys(Kb, key, exists, stride_kn, ALL, D, BLOCK_D)
    if ALL and Vd is not None:
        v = load_block(Vd, batch, head, unit * UNIT + first % UNIT, COLS, BLOCK_D)
    else:
        v = load_keys(Vb, key, exists, stride_vn, ALL, D, BLOCK_D)
    weight = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 - lse[:, None])
    if MASKED:
        seen = exists[None, :] & (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
        weight = tl.where(seen, weight, 0.0)
    # A key that does not exist was loaded as zero: its column of dscore adds nothing to dq.
    dweight = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    dscore = weight * (dweight - delta[:, None])
    return tl.dot(dscore.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=COUNTS)
def _block_sparse_attention_bwd_dq(
    Q, K, V, Kd, Vd, Out, Dout, Lse, Delta, Dq, Tiles, Units, Span, Index, Count,
    scale, num_queries, num_tiles, num_units, list_length, kv_heads,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_db, stride_dh, stride_dn,
    stride_ob, stride_oh, stride_on,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    REGULAR: tl.constexpr, REGULAR_TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = (num_tiles - 1 - tl.program_id(0) // SPLITS).to(tl.int64)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    token, g, exists = tile_rows(
        Tiles, (batch * num_tiles + t, t), tl.program_id(0) % SPLITS * ROWS, GROUP, ROWS, TOKENS,
        REGULAR_TILES,
    )  # fmt: skip
    low, high = row_span(Span, token, exists, num_queries, batch)
    q_base = Q + batch * stride_qb + head * GROUP * stride_qh
    d_base = Dout + batch * stride_db + head * GROUP * stride_dh
    q = load_rows(q_base, token, g, exists, stride_qh, stride_qn, False, D, BLOCK_D)
    do = load_rows(d_base, token, g, exists, stride_dh, stride_dn, False, D, BLOCK_D)
    heads = (batch * kv_heads + head) * GROUP + g
    lse = tl.load(Lse + heads * num_queries + token, mask=exists, other=float("inf")) * LOG2E
    lse = tl.where(lse == -float("inf"), float("inf"), lse)
    # What the softmax takes off every score's gradient; the kernel for dK and dV reads it too.
    o_base = Out + batch * stride_ob + head * GROUP * stride_oh
    out = load_rows(o_base, token, g, exists, stride_oh, stride_on, False, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(Delta + heads * num_queries + token, delta, mask=exists)
    Kb = K + batch * stride_kb + head * stride_kh
    Vb = V + batch * stride_vb + head * stride_vh
    Ub = Units + batch * num_units * 2
    row = (batch * kv_heads + head) * num_tiles + t
    Ib = Index + row * list_length
    count = tl.load(Count + row)
    scale2 = scale * LOG2E
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    begin, end = unmasked_columns(Ib, Ub, count, low, high, exists, UNIT, COLS, False)
    ahead = listed_units(Ib, begin, count, UNIT, COLS)
    for first in range(begin, end, COLS):
        unit = ahead
        ahead = listed_units(Ib, first + COLS, count, UNIT, COLS)
        acc = _query_step(
            q, do, lse, delta, acc, Kd, Vd, Kb, Vb, Ub, unit, batch, head, first, count, low, high,
            scale2, stride_kn, stride_vn, False, REGULAR, UNIT, COLS, D, BLOCK_D, PRECISION,
        )  # fmt: skip
    cut = begin + tl.maximum(count * UNIT - end, 0)
    for i in range(0, cut, COLS):
        first = tl.where(i < begin, i, end + i - begin)
        unit = listed_units(Ib, first, count, UNIT, COLS)
        acc = _query_step(
            q, do, lse, delta, acc, Kd, Vd, Kb, Vb, Ub, unit, batch, head, first, count, low, high,
            scale2, stride_kn, stride_vn, True, REGULAR, UNIT, COLS, D, BLOCK_D, PRECISION,
        )  # fmt: skip
    dim = tl.arange(0, BLOCK_D)
    pointer = Dq + (heads * num_queries + token)[:, None] * D + dim[None, :]
    tl.store(
        pointer, (acc * scale).to(Dq.dtype.element_ty), mask=exists[:, None] & (dim < D)[None, :]
    )


@triton.jit
def _key_step(
    k, v, key, in_unit, dk, dv, tile, part, Qd, Dd, Q, Dout, Lse, Delta, Tiles, Span, head, batch,
    scale2, num_queries, num_tiles, kv_heads, stride_qh, stride_qn, stride_dh, stride_dn,
    MASKED: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    SPLITS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, REGULAR_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of one tile against one unit, keys down and queries across: (C, R)."""
    ALL: tl.constexpr = REGULAR_TILES and TOKENS * GROUP == ROWS * SPLITS
    BOXED: tl.constexpr = ALL and not MASKED and ROWS % GROUP == 0
    t = tile.to(tl.int64)
    token, g, exists = tile_rows(
        Tiles, (batch * num_tiles + t, t), part * ROWS, GROUP, ROWS, TOKENS, REGULAR_TILES
    )
    first = tile * TOKENS + part * (ROWS // GROUP)
    if BOXED:
        # Head by head, as a box of several is copied.
        row = tl.arange(0, ROWS)
        token, g = first + row % (ROWS // GROUP), row // (ROWS // GROUP)
    if BOXED and Qd is not None:
        q = load_block(Qd, batch, head * GROUP, first, ROWS, BLOCK_D)
    else:
        q = load_rows(Q, token, g, exists, stride_qh, stride_qn, ALL, D, BLOCK_D)
    if BOXED and Dd is not None:
        do = load_block(Dd, batch, head * GROUP, first, ROWS, BLOCK_D)
    else:
        do = load_rows(Dout, token, g, exists, stride_dh, stride_dn, ALL, D, BLOCK_D)
    rows = ((batch * kv_heads + head) * GROUP + g) * num_queries + token
    if ALL:
        lse = tl.load(Lse + rows) * LOG2E
        delta = tl.load(Delta + rows)
    else:
        lse = tl.load(Lse + rows, mask=exists, other=float("inf")) * LOG2E
        delta = tl.load(Delta + rows, mask=exists, other=0.0)
    weight = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2 - lse[None, :])
    if MASKED:
        low, high = row_span(Span, token, exists, num_queries, batch)
        seen = in_unit[:, None] & (key[:, None] >= low[None, :]) & (key[:, None] < high[None, :])
        weight = tl.where(seen, weight, 0.0)
    dv = tl.dot(weight.to(do.dtype), do, dv, input_precision=PRECISION)
    dweight = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    dscore = weight * (dweight - delta[None, :])
    return tl.dot(dscore.to(q.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit
def _early_first(
    program, num_units, groups, pieces, PARTS: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """Unit and part, KV head of a batch, piece of the list and number of pieces of a program.

    All tiles keep the sinks: the first units of all heads come first, their lists in pieces, or
    all would wait for these. Then head by head the others, whose queries the cache holds.
    """
    early = tl.minimum(num_units, EARLY) * PARTS
    others = tl.maximum(num_units * PARTS - early, 1)
    behind = program - early * groups * pieces
    first = behind < 0
    place = tl.where(first, program // pieces // groups, early + behind % others)
    group = tl.where(first, program // pieces % groups, behind // others)
    piece = tl.where(first, program % pieces, 0)
    return place, group.to(tl.int64), piece, tl.where(first, pieces, 1)


@triton.jit
def _store_keys(Dk, Dv, dk, dv, row, in_unit, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of gradients of keys and of values, in the dtype of where they go."""
    dim = tl.arange(0, BLOCK_D)
    pointer = row.to(tl.int64)[:, None] * D + dim[None, :]
    mask = in_unit[:, None] & (dim < D)[None, :]
    tl.store(Dk + pointer, dk.to(Dk.dtype.element_ty), mask=mask)
    tl.store(Dv + pointer, dv.to(Dv.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _add_list_chunks(
    SumsK, SumsV, Dk, Dv, Units, num_units, num_keys, kv_heads, pieces, UNIT: tl.constexpr,
    COLS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of the first units, from those of the pieces of their lists, in their order."""
    PARTS: tl.constexpr = UNIT // COLS
    place, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    unit = Units + (group // kv_heads * num_units + place // PARTS) * 2
    offset = place % PARTS * COLS + tl.arange(0, COLS)
    in_unit = offset < tl.load(unit + 1)
    # Where the programs of this place and group wrote, chunk by chunk.
    row = (place * tl.num_programs(1) + group) * pieces * COLS + tl.arange(0, COLS)
    dim = tl.arange(0, BLOCK_D)
    pointer, mask = row[:, None] * D + dim[None, :], in_unit[:, None] & (dim < D)[None, :]
    dk = tl.zeros([COLS, BLOCK_D], tl.float32)
    dv = tl.zeros([COLS, BLOCK_D], tl.float32)
    for i in range(pieces):
        dk += tl.load(SumsK + pointer + i * COLS * D, mask=mask, other=0.0)
        dv += tl.load(SumsV + pointer + i * COLS * D, mask=mask, other=0.0)
    key = group * num_keys + tl.load(unit) + offset
    _store_keys(Dk, Dv, dk, dv, key, in_unit, D, BLOCK_D)


@triton.jit(do_not_specialize=COUNTS)
def _block_sparse_attention_bwd_dkv(
    Q, K, V, Qd, Dd, Dout, Lse, Delta, Dk, Dv, SumsK, SumsV, Tiles, Units, Span, TileIds, Edges,
    chunks, scale, num_queries, num_keys, num_tiles, num_units, kv_heads, groups, pieces,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_db, stride_dh, stride_dn,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    REGULAR: tl.constexpr, REGULAR_TILES: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = UNIT // COLS
    place, group, piece, own_pieces = _early_first(
        tl.program_id(0), num_units, groups, pieces, PARTS, EARLY
    )
    batch, head = group // kv_heads, group % kv_heads
    u, part = (place // PARTS).to(tl.int64), place % PARTS
    start = tl.load(Units + (batch * num_units + u) * 2)
    length = tl.load(Units + (batch * num_units + u) * 2 + 1)
    offset = part * COLS + tl.arange(0, COLS)
    key, in_unit = start + offset, offset < length
    k = load_keys(
        K + batch * stride_kb + head * stride_kh, key, in_unit, stride_kn, False, D, BLOCK_D
    )
    v = load_keys(
        V + batch * stride_vb + head * stride_vh, key, in_unit, stride_vn, False, D, BLOCK_D
    )
    Qb = Q + batch * stride_qb + head * GROUP * stride_qh
    Db = Dout + batch * stride_db + head * GROUP * stride_dh
    scale2 = scale * LOG2E
    dk = tl.zeros([COLS, BLOCK_D], tl.float32)
    dv = tl.zeros([COLS, BLOCK_D], tl.float32)
    edge = Edges + ((batch * kv_heads + head) * num_units + u) * 2 * chunks
    begin = tl.load(edge) * SPLITS
    cut = tl.load(edge + chunks) * SPLITS
    end = tl.load(edge + 2 * chunks) * SPLITS
    behind = cut + (end - cut) * (piece + 1) // own_pieces
    last = begin + (cut - begin) * (piece + 1) // own_pieces
    begin += (cut - begin) * piece // own_pieces
    ahead = tl.load(TileIds + begin // SPLITS, mask=begin < end, other=0)
    for entry in range(begin, last):
        tile = ahead
        ahead = tl.load(TileIds + (entry + 1) // SPLITS, mask=entry + 1 < end, other=0)
        dk, dv = _key_step(
            k, v, key, in_unit, dk, dv, tile, entry % SPLITS, Qd, Dd, Qb, Db, Lse, Delta, Tiles,
            Span, head, batch, scale2, num_queries, num_tiles, kv_heads, stride_qh, stride_qn,
            stride_dh, stride_dn, False, GROUP, TOKENS, ROWS, SPLITS, D, BLOCK_D, REGULAR_TILES,
            PRECISION,
        )  # fmt: skip
    for entry in range(cut + (end - cut) * piece // own_pieces, behind):
        tile = tl.load(TileIds + entry // SPLITS)
        dk, dv = _key_step(
            k, v, key, in_unit, dk, dv, tile, entry % SPLITS, Qd, Dd, Qb, Db, Lse, Delta, Tiles,
            Span, head, batch, scale2, num_queries, num_tiles, kv_heads, stride_qh, stride_qn,
            stride_dh, stride_dn, True, GROUP, TOKENS, ROWS, SPLITS, D, BLOCK_D, REGULAR_TILES,
            PRECISION,
        )  # fmt: skip
    if own_pieces > 1:
        row = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
        _store_keys(SumsK, SumsV, dk * scale, dv, row, in_unit, D, BLOCK_D)
    else:
        _store_keys(Dk, Dv, dk * scale, dv, group * num_keys + key, in_unit, D, BLOCK_D)


def query_chunks(rows: int, head_dim: int, itemsize: int, major: int) -> tuple[int, int, int, int]:
    """(rows, keys) of a block, warps and stages of the kernel for dQ, as measured."""
    width = max(next_power_of_2(head_dim), 16)
    if itemsize == 4:
        return min(rows, 32 if width <= 128 else 16), 16, 4, 1
    if width > 128:
        return min(rows, 32), 32, 4, 2
    if major in (9, 10) and rows >= 128:
        return 128, 64, 4 if width <= 64 else 8, 3
    return min(rows, 64), 64, 4, 2


def key_blocks(
    rows: int, unit: int, head_dim: int, itemsize: int, major: int
) -> tuple[int, int, int, int]:
    """The same for dK and dV, which hold two accumulators and one unit (or a part of it)."""
    width = max(next_power_of_2(head_dim), 16)
    if itemsize == 4:
        return min(rows, 32 if width <= 128 else 16), 16, 4, 1
    if width > 128:
        return min(rows, 32), min(unit, 32), 4, 2
    most = 128 if width <= 64 and major in (9, 10) else 64
    return min(rows, most), min(unit, 64), 4 if unit > 16 else 2, 2


def block_sparse_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: BlockLists,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernels; arguments as in `block_sparse_attention_fwd`.

    Returns:
        dq, dk, dv, contiguous, in the dtypes of q, k, v; keys that belong to no unit get zeros.
    """
    tiles, units, span, index, count, tile_tokens, unit, lead, tile_lead = lists
    batch, heads, num_queries, head_dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    num_tiles, num_units = tiles.shape[1], units.shape[1]
    group = heads // kv_heads
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    # Even units cover every key; keys outside all units have no gradient.
    blank = torch.zeros_like if lead < 0 else torch.empty_like
    dk, dv = (blank(x, memory_format=torch.contiguous_format) for x in (k, v))
    delta = torch.empty_like(lse)
    block_d, major = max(next_power_of_2(head_dim), 16), generation(q)
    all_rows = max(next_power_of_2(min(tile_tokens, num_queries) * group), 16)
    rows, cols, warps, stages = query_chunks(all_rows, head_dim, q.element_size(), major)
    regular = all_whole(lead, unit, num_keys)
    regular_tiles = all_whole(tile_lead, tile_tokens, num_queries)
    whole = regular and cols <= unit
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    constants = {
        "GROUP": group, "TOKENS": tile_tokens, "UNIT": unit, "REGULAR": regular,
        "REGULAR_TILES": regular_tiles, "D": head_dim, "BLOCK_D": block_d,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    _block_sparse_attention_bwd_dq[(num_tiles * (all_rows // rows), batch * kv_heads)](
        q, k, v, *(describe(x, cols, block_d) if whole else None for x in (k, v)),
        out, dout, lse, delta, dq, tiles, units, span, index, count,
        scale, num_queries, num_tiles, num_units, index.shape[-1], kv_heads, *strides,
        *out.stride()[:3],
        ROWS=rows, COLS=cols, SPLITS=all_rows // rows, num_warps=warps, num_stages=stages,
        **constants,
    )  # fmt: skip
    lists = transpose_lists(tiles, units, span, index, count, tile_tokens, unit)
    rows, cols, warps, stages = key_blocks(all_rows, unit, head_dim, q.element_size(), major)
    described = (None, None)
    # Boxes of several heads are faster than pointers for wide units alone (16384 tokens, 32 / 8
    # heads: 4.4 ms for 5.7 with units of 64, 10 for 6.4 with units of 16).
    if regular_tiles and rows % group == 0 and (group == 1 or unit >= 64):
        described = (describe(x, rows // group, block_d, group) for x in (q, dout))
    groups, parts = batch * kv_heads, unit // cols
    early, pieces = max(EARLY_KEYS // unit, 1), pieces_of(num_tiles)
    first, sums = min(early, num_units) * parts, (delta, delta)
    if pieces > 1:
        sums = q.new_empty(2, first, groups, pieces, cols, head_dim, dtype=torch.float32)
    _block_sparse_attention_bwd_dkv[((num_units * parts + first * (pieces - 1)) * groups,)](
        q, k, v, *described, dout, lse, delta, dk, dv, *sums, tiles, units, span, *lists,
        scale, num_queries, num_keys, num_tiles, num_units, kv_heads, groups, pieces, *strides,
        ROWS=rows, COLS=cols, SPLITS=all_rows // rows, EARLY=early, num_warps=warps,
        num_stages=stages, **constants,
    )  # fmt: skip
    if pieces > 1:
        _add_list_chunks[(first, groups)](
            *sums, dk, dv, units, num_units, num_keys, kv_heads, pieces, UNIT=unit, COLS=cols,
            D=head_dim, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return dq, dk, dv


def pieces_of(num_tiles: int) -> int:
    """Pieces of the list of a unit that all tiles may keep."""
    return min(max(num_tiles // PIECE, 1), MOST_PIECES)

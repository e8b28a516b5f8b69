"""The share that the query pools of a tile give to every unit, by descriptors of both.

B batch, H query heads, K KV heads, G = H / K, S query pools, T tiles, U units,
F width of a descriptor
"""

# Triton launches are subscripts of a jit function, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false
import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_sparse.kernels.cached_launch import launch
from mm_sparse.kernels.device import generation, multiprocessors
from mm_sparse.kernels.paged.pages import Pages, page_arguments
from mm_sparse.kernels.sizes import cdiv, next_power_of_2, unit_chunks
from mm_sparse.kernels.triton.few_row_scores import (
    READ_UNITS,
    few_row_logits,
    few_row_shares,
    units_of_block,
)
from mm_sparse.kernels.triton.primitives import COUNTS, LOG2E, even_units, fast_log2
from mm_sparse.kernels.triton.score_rows import (
    LN2,
    deny,
    distance_bias,
    log_of_share,
    over_members,
    row_in_memory,
    rows_of,
    seen_units,
    sum_of_splits,
)

# Threads of a warp that share a row of a product, two adjacent columns of eight each.
LANES = tl.constexpr(4)
# Programs that share a multiprocessor, for registers and shared memory of 128 rows.
RESIDENT = 3
# Numbers that rows of scores are a multiple of.
ALIGNED = 16
# Most rows of a head's only block, in decoding, that have kernels of their own.
FEW_ROWS = 32


@triton.jit
def _log_sizes(size, UNIT: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr):
    """Log2 of the share that the keys of units, or of their parts PART, are of a whole one."""
    WIDTH: tl.constexpr = (UNIT + PARTS - 1) // PARTS
    members = size
    if PARTS > 1:
        members = tl.minimum(tl.maximum(size - PART * WIDTH, 0), WIDTH)
    share = tl.log2(tl.maximum(members, 1).to(tl.float32) / WIDTH)
    return tl.where(members > 0, share, -float("inf"))


@triton.jit
def _logits(
    row, low, high, all_low, all_high, Keys, Units, first, num_units, num_keys, lead,
    F: tl.constexpr, BLOCK_F: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, PageTable, PAGE_UNITS: tl.constexpr,
    PAGE_STRIDE: tl.constexpr, PART: tl.constexpr = 0, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """(rows, COLS) products with logs of sizes added; -inf where a tile sees nothing.

    `Keys` describe the whole units, or PARTS parts of each, from number PART on.
    """
    unit = first + tl.arange(0, COLS)
    dim = tl.arange(0, BLOCK_F)
    mask = (unit < num_units)[:, None]
    if F < BLOCK_F:
        mask = mask & (dim < F)[None, :]
    place = unit
    if PAGE_UNITS > 0:
        # Pages behind the last one that a row sees have no entry.
        reached = (unit < num_units) & (unit * UNIT < tl.max(high, 0))
        mask = mask & reached[:, None]
        page = tl.load(PageTable + unit // PAGE_UNITS, mask=reached, other=0)
        place = page * PAGE_STRIDE + unit % PAGE_UNITS
    keys = tl.load(
        Keys + place.to(tl.int64)[:, None] * (F * PARTS) + dim[None, :], mask=mask, other=0.0
    )  # fmt: skip
    logits = tl.dot(row, tl.trans(keys), input_precision=PRECISION)
    if EVEN:
        start, size = even_units(unit, lead, num_keys, UNIT)
        reach = first * UNIT - lead
        # The first and the last may be short.
        cut = (first == 0) | (first + COLS >= num_units)
        cut |= (reach + UNIT <= all_low) | (reach + (COLS - 1) * UNIT >= all_high)
        if cut:
            logits += (_log_sizes(size, UNIT, PART, PARTS) * LN2)[None, :]
    else:
        start = tl.load(Units + unit * 2, mask=unit < num_units, other=0)
        size = tl.load(Units + unit * 2 + 1, mask=unit < num_units, other=0)
        logits += (_log_sizes(size, UNIT, PART, PARTS) * LN2)[None, :]
        start = tl.where(size > 0, start, 2147483647)
        cut = tl.max(((start >= all_high) | (start + size <= all_low)).to(tl.int32), 0) > 0
    if cut:
        seen = (start[None, :] < high[:, None]) & ((start + size)[None, :] > low[:, None])
        logits = tl.where(seen, logits, -float("inf"))
    return logits


@triton.jit(do_not_specialize=COUNTS)
def _block_scores_lse(
    Rows, Keys, Exists, Hull, Units, Sums, PageTable, num_tiles, num_units, kv_heads,
    splits, chunk, num_keys, lead, stride_k, row_length, stride_pages, GROUP: tl.constexpr,
    QUERY_POOLS: tl.constexpr, ORDER: tl.constexpr, COLS: tl.constexpr, F: tl.constexpr,
    BLOCK_F: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    PAGE_UNITS: tl.constexpr, PAGE_STRIDE: tl.constexpr,
):  # fmt: skip
    """Log2 of the sum over a chunk of units of what each row of a block of tiles gives to them.

    Sums of every fourth pair of columns meet behind the loop: where a warp has whole rows of a
    product, each thread adds up what it holds.
    """
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    block, split = program // splits, program % splits
    Units += batch * num_units * 2
    Keys += row_in_memory(batch, kv_heads, head, PAGE_UNITS) * stride_k
    if PAGE_UNITS > 0:
        PageTable += batch * stride_pages
    row, low, high, exists = rows_of(
        Rows, Exists, Hull, block, num_tiles, kv_heads, batch, head,
        GROUP, QUERY_POOLS, ORDER, F, BLOCK_F,
    )  # fmt: skip
    first = split * chunk
    begin, end, all_low, all_high = seen_units(
        Units, low, high, exists, first, tl.minimum(first + chunk, num_units), num_keys, lead,
        UNIT, EVEN,
    )  # fmt: skip
    ROWS: tl.constexpr = ORDER[0] * ORDER[1] * ORDER[2] * ORDER[3] * ORDER[4]
    top = tl.full([ROWS, LANES], -float("inf"), tl.float32)
    total = tl.zeros([ROWS, LANES], tl.float32)
    for at in range(begin // COLS * COLS, end, COLS):
        logits = _logits(
            row, low, high, all_low, all_high, Keys, Units, at, num_units, num_keys, lead,
            F, BLOCK_F, UNIT, COLS, EVEN, PRECISION, PageTable, PAGE_UNITS, PAGE_STRIDE,
        )  # fmt: skip
        columns = tl.reshape(logits, (ROWS, COLS // (2 * LANES), LANES, 2))
        new_top = tl.maximum(top, tl.max(tl.max(columns, 3), 1) * LOG2E)
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        given = tl.exp2(columns * LOG2E - shift[:, None, :, None])
        total = total * tl.exp2(top - shift) + tl.sum(tl.sum(given, 3), 1)
        top = new_top
    # Powers alone are added: of two products a compiler rounds one, so that threads that hold the
    # same row would differ in its last bit.
    lane = top + fast_log2(tl.where(top == -float("inf"), 1.0, total))
    top = tl.max(lane, 1)
    shift = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp2(lane - shift[:, None]), 1)
    sums = Sums + (tl.program_id(1) * tl.num_programs(0) + program).to(tl.int64) * ROWS
    tl.store(sums + tl.arange(0, ROWS), top + tl.log2(tl.where(total > 0, total, 1.0)))


@triton.jit(do_not_specialize=COUNTS)
def _block_scores(
    Rows, Keys, Exists, Hull, Units, Sums, PageTable, Parts, Out, Bias, TileKind, UnitKind,
    Tiles, num_tiles, num_units, kv_heads, splits, chunk, num_keys, lead, stride_k, row_length,
    stride_pages, stride_p, query_offset, GROUP: tl.constexpr, QUERY_POOLS: tl.constexpr,
    ORDER: tl.constexpr, COLS: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr,
    UNIT: tl.constexpr, EVEN: tl.constexpr, KINDS: tl.constexpr, BUCKETS: tl.constexpr,
    LARGEST: tl.constexpr, BIASED: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, PAGE_UNITS: tl.constexpr, PAGE_STRIDE: tl.constexpr,
):  # fmt: skip
    """Shares that a block of tiles gives to a chunk of units, from the sums of all chunks."""
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    block, split = program // splits, program % splits
    Units += batch * num_units * 2
    in_memory = row_in_memory(batch, kv_heads, head, PAGE_UNITS)
    Keys += in_memory * stride_k
    Parts += in_memory * stride_p
    if PAGE_UNITS > 0:
        PageTable += batch * stride_pages
    Out += (batch * kv_heads + head) * num_tiles * row_length
    row, low, high, exists = rows_of(
        Rows, Exists, Hull, block, num_tiles, kv_heads, batch, head,
        GROUP, QUERY_POOLS, ORDER, F, BLOCK_F,
    )  # fmt: skip
    ROWS: tl.constexpr = ORDER[0] * ORDER[1] * ORDER[2] * ORDER[3] * ORDER[4]
    TILES: tl.constexpr = ORDER[1] * ORDER[3]
    sums = Sums + (tl.program_id(1) * tl.num_programs(0) + block * splits).to(tl.int64) * ROWS
    lse = sum_of_splits(sums, exists, splits, ROWS)
    members = tl.reshape(
        exists.to(tl.float32), (ORDER[0], ORDER[1], ORDER[2], ORDER[3], ORDER[4], 1)
    )  # fmt: skip
    per_member = 1.0 / tl.maximum(over_members(members, False), 1.0)
    own = block * TILES + tl.arange(0, TILES)
    first = split * chunk
    last = tl.minimum(first + chunk, num_units)
    begin, end, all_low, all_high = seen_units(
        Units, low, high, exists, first, last, num_keys, lead, UNIT, EVEN
    )
    begin = tl.minimum(begin, last) // COLS * COLS
    deny(Out, own, first, begin, num_tiles, row_length, COLS)
    for at in range(begin, end, COLS):
        if PARTS > 1:
            # The sums are over whole units, so that parts cost one product, not two.
            given = tl.zeros([ROWS, COLS], tl.float32)
            for part in tl.static_range(PARTS):
                logits = _logits(
                    row, low, high, all_low, all_high, Parts + part * F, Units, at, num_units,
                    num_keys, lead, F, BLOCK_F, UNIT, COLS, EVEN, PRECISION, PageTable, PAGE_UNITS,
                    PAGE_STRIDE, part, PARTS,
                )  # fmt: skip
                given += tl.exp2(logits * LOG2E - lse[:, None])
            value = tl.reshape(
                given, (ORDER[0], ORDER[1], ORDER[2], ORDER[3], ORDER[4], COLS)
            )  # fmt: skip
            value = over_members(value, LARGEST) * (1.0 / PARTS)
            if not LARGEST:
                value *= per_member
            value = log_of_share(value)
        else:
            logits = _logits(
                row, low, high, all_low, all_high, Keys, Units, at, num_units, num_keys, lead,
                F, BLOCK_F, UNIT, COLS, EVEN, PRECISION, PageTable, PAGE_UNITS, PAGE_STRIDE,
            )  # fmt: skip
            share = tl.reshape(
                logits * LOG2E - lse[:, None],
                (ORDER[0], ORDER[1], ORDER[2], ORDER[3], ORDER[4], COLS),
            )  # fmt: skip
            if LARGEST:
                best = over_members(share, True)
                value = tl.where(best == -float("inf"), -1e30, best * LN2)
            else:
                value = log_of_share(over_members(tl.exp2(share), False) * per_member)
        value = tl.reshape(value, (TILES, COLS))
        unit = at + tl.arange(0, COLS)
        if BIASED:
            mask = (own < num_tiles)[:, None] & (unit < num_units)[None, :]
            value += distance_bias(
                Bias + head * KINDS * KINDS * BUCKETS, Tiles + batch * num_tiles * 2,
                TileKind + batch * num_tiles, UnitKind + batch * num_units, Units,
                own, unit, mask, num_tiles, num_units, query_offset, KINDS, BUCKETS,
            )  # fmt: skip
        out = Out + own.to(tl.int64)[:, None] * row_length + unit[None, :]
        # Rows are longer than their units, so that numbers are written together.
        mask = unit < row_length
        tl.store(out, value, mask=(own < num_tiles)[:, None] & mask[None, :])
    behind = begin + (tl.maximum(end - begin, 0) + COLS - 1) // COLS * COLS
    deny(Out, own, behind, last, num_tiles, row_length, COLS)


def row_order(tile_rows: int, rows: int) -> tuple[int, int, int, int, int]:
    """Factors of `rows`: (members, tiles, members, tiles, members), the last ones adjacent.

    In the accumulator of a product of 64 or more rows, 8 adjacent ones lie along the lanes of a
    warp; the 8 beside them, and those 64 further, are other registers of the same threads. Members
    of a tile go there first, so that most of a tile is reduced without a shuffle.
    """
    pair = min(tile_rows, 2)
    outer = min(tile_rows // pair, 2) if rows >= 128 else 1
    lanes = min(tile_rows // (pair * outer), 8)
    outer = tile_rows // (pair * lanes)
    tiles = max(rows // tile_rows, 1)
    inner = min(8 // lanes, tiles)
    return outer, tiles // inner, pair, inner, lanes


@lru_cache(maxsize=4096)
def share_blocks(
    tile_rows: int, width: int, itemsize: int, generation: int, tiles: int = 128
) -> tuple[tuple[int, int, int, int, int], int, int]:
    """Order of the rows of a block, its units and stages.

    float32 runs out of registers and takes small blocks. Others take what lets two or three
    programs share a multiprocessor, so that the products of one hide the powers of another; few
    tiles, as in decoding, no more rows than they have.
    """
    if itemsize == 4:
        return row_order(tile_rows, max(16, tile_rows)), 16, 2
    # From tensor memory each thread takes a whole row.
    cols = 64 if width <= 128 and generation != 10 else 32
    rows = 128 if width <= 128 or generation in (9, 10) else 64
    rows = min(rows, max(tile_rows * next_power_of_2(tiles), 16))
    return row_order(tile_rows, max(rows, tile_rows)), cols, 2


def by_heads(x: Tensor) -> tuple[Tensor, int]:
    """(B, K, U, ...) with each head's descriptors in one run, and how far apart two heads are.

    A cache leaves room between them, which is not worth a copy.
    """
    batch, heads = x.shape[:2]
    inner = tuple(math.prod(x.shape[i:]) for i in range(3, x.dim() + 1))
    apart = x.stride(1) if heads > 1 else x.stride(0)
    even = batch == 1 or heads == 1 or x.stride(0) == heads * apart
    if even and x.stride()[2:] == inner:
        return x, apart
    return x.contiguous(), math.prod(x.shape[2:])


def of_shares(parts: Tensor, constants: dict[str, Any]) -> dict[str, Any]:
    """Constants of `_block_scores`: more registers than the sums, so fewer units a step."""
    count = 1 if parts.dim() == 4 else parts.shape[3]
    fewer = max(constants["COLS"] // 2, 16) if count > 1 else min(constants["COLS"], 32)
    return {**constants, "PARTS": count, "COLS": fewer}


def has_few_rows(rows: Tensor, kv_heads: int) -> bool:
    """Whether the pools (B, H, T, S, F) of all tiles are one block of few rows, as in decoding."""
    tiles, order = rows.shape[2], _block_of(rows, kv_heads)[0]
    return order[1] * order[3] >= tiles and math.prod(order) <= FEW_ROWS


def _block_of(rows: Tensor, kv_heads: int) -> tuple[tuple[int, int, int, int, int], int, int]:
    heads, tiles, query_pools, width = rows.shape[1:]
    # The interpreter has no registers to run out of, and is slow on small blocks.
    itemsize = rows.element_size() if rows.is_cuda else 2
    tile_rows = next_power_of_2(heads // kv_heads * query_pools)
    return share_blocks(tile_rows, width, itemsize, generation(rows), tiles)


def block_scores(
    rows: Tensor, keys: Tensor | None, exists: Tensor, tiles: Tensor, hull: Tensor, units: Tensor,
    unit: int, *, largest: bool = False, bias: Tensor | None = None,
    tile_kind: Tensor | None = None, unit_kind: Tensor | None = None, query_offset: int = 0,
    lead: int = -1, num_keys: int = 0, parts: Tensor | None = None, pages: Pages | None = None,
) -> Tensor:  # fmt: skip
    """Log of the mean (or largest) share that query pools give to a unit, biases added.

    Args:
        rows: (B, H, T, S, F) descriptors of query pools, scale included.
        keys: (B, K, U, F), of units, in the same dtype; None of few rows (`has_few_rows`) with
            `parts`, whose means they are.
        exists: (B, T, S) bool.
        hull: (B, T, 2) int32, range of keys that a tile sees.
        bias: (K, kinds, kinds, buckets) float32 by kind of tile and unit and by distance.
        tile_kind, unit_kind: (B, T) and (B, U) int8.
        lead: if not -1, unit u is what exists of the `unit` keys from u * unit - lead on, of
            `num_keys` in all.
        parts: (B, K, U, C, F), of the C runs of ceil(unit / C) keys of each unit: what is added up,
            while `keys` give the sum that shares are of.
        pages: where the units of each row are described: `keys` (1, K, all units in memory, F),
            and `parts` alike.
    Returns:
        (B, K, T, U) float32; what a tile does not see holds -1e30 or so.
    """
    batch, heads, num_tiles, query_pools, width = rows.shape
    described = parts if keys is None else keys
    if described is None:
        raise ValueError("keys must be given where there are no parts, got None")
    kv_heads, num_units = described.shape[1], units.shape[1]
    group = heads // kv_heads
    order, cols, stages = _block_of(rows, kv_heads)
    row_length = cdiv(num_units, ALIGNED) * ALIGNED
    out = rows.new_empty(batch, kv_heads, num_tiles, row_length, dtype=torch.float32)
    if not out.numel():
        return out[..., :num_units]
    few = has_few_rows(rows, kv_heads)
    count = 1 if parts is None else parts.shape[3]
    if few:
        described = described if parts is None else parts
        cols = units_of_block(count, rows.element_size())
    elif keys is None:
        raise ValueError("keys must be given of more than few rows, got None")
    blocks = cdiv(num_tiles, order[1] * order[3])
    places = RESIDENT * multiprocessors(rows)
    splits, chunk = unit_chunks(blocks * batch * kv_heads, num_units, cols, places)
    grid = (blocks * splits, batch * kv_heads)
    sums = out.new_empty(*grid, math.prod(order))
    described, stride_k = by_heads(described)
    table_of_pages, stride_pages, page_sizes = page_arguments(pages)
    rows, exists = rows.contiguous(), exists.contiguous()
    biased = (
        out if bias is None else bias.contiguous(), units if tile_kind is None else tile_kind,
        units if unit_kind is None else unit_kind, tiles,
    )  # fmt: skip
    of_bias = {
        "KINDS": 1 if bias is None else bias.shape[1],
        "BUCKETS": 2 if bias is None else bias.shape[3],
        "LARGEST": largest, "BIASED": bias is not None,
    }  # fmt: skip
    sizes = {
        "GROUP": group, "QUERY_POOLS": query_pools, "ORDER": order, "COLS": cols, "F": width,
        "BLOCK_F": max(next_power_of_2(width), 16), "UNIT": unit, "EVEN": lead >= 0,
        "num_warps": 4, "num_stages": stages,
    }  # fmt: skip
    precision = "ieee" if rows.dtype == torch.float32 else "tf32"
    constants = {**sizes, "PRECISION": precision, **page_sizes}
    if few:
        logits = out.new_empty(batch * kv_heads, math.prod(order), row_length)
        launch(
            few_row_logits, grid, rows, described, exists, hull, units, sums, logits,
            table_of_pages, num_tiles, num_units, kv_heads, chunk, num_keys, lead, stride_k,
            row_length, stride_pages, **constants, PARTS=count,
        )  # fmt: skip
        launch(
            few_row_shares, grid, rows, exists, hull, units, sums, logits, out, *biased, num_tiles,
            num_units, kv_heads, splits, chunk, num_keys, lead, row_length, query_offset,
            **sizes, READ=READ_UNITS, PARTS=count, **of_bias,
        )  # fmt: skip
        return out[..., :num_units]
    parts, stride_p = (described, 0) if parts is None else by_heads(parts)
    inputs = (rows, described, exists, hull, units, sums, table_of_pages)
    counts = (
        num_tiles, num_units, kv_heads, splits, chunk, num_keys, lead, stride_k, row_length,
        stride_pages,
    )  # fmt: skip
    launch(_block_scores_lse, grid, *inputs, *counts, **constants)
    launch(
        _block_scores, grid, *inputs, parts, out, *biased, *counts, stride_p, query_offset,
        **of_bias, **of_shares(parts, constants),
    )  # fmt: skip
    return out[..., :num_units]

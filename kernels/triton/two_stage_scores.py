"""The share that the query pools of a tile give to the units of listed runs, and to no others.

B batch, H query heads, K KV heads, G = H / K, S query pools, T tiles, U units, R listed runs,
C = R x units of a run, F width of a descriptor
"""

# Triton launches are subscripts of a jit function, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_sparse.kernels.cached_launch import launch
from mm_sparse.kernels.sizes import next_power_of_2
from mm_sparse.kernels.triton.block_scores import _log_sizes, by_heads
from mm_sparse.kernels.triton.primitives import COUNTS, LOG2E, even_units
from mm_sparse.kernels.triton.score_rows import LN2, distance_bias

# Units of a step. Small programs, of which a multiprocessor runs many, hide how long the gathers
# take: of blocks, warps and stages that were tried on an H200 these took 2.4 ms where 64 units, 4
# warps and 3 stages took 5.5 (131,072 tokens, 2048 units a tile).
COLS = 32


@triton.jit
def _units_of(
    Runs, at, count, Units, num_units, num_keys, lead, low, high,
    COLS: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, COARSE: tl.constexpr,
):  # fmt: skip
    """Units of the slots from `at` on, their sizes, and which of them the tile sees."""
    slot = at + tl.arange(0, COLS)
    run = tl.load(Runs + slot // COARSE, mask=slot < count, other=0)
    unit = run.to(tl.int32) * COARSE + slot % COARSE
    there = (slot < count) & (unit < num_units)
    if EVEN:
        start, size = even_units(unit, lead, num_keys, UNIT)
        size = tl.where(there, size, 0)
    else:
        start = tl.load(Units + unit * 2, mask=there, other=0)
        size = tl.load(Units + unit * 2 + 1, mask=there, other=0)
    return unit, size, (size > 0) & (start < high) & (start + size > low)


@triton.jit
def _products(
    row, Keys, unit, seen, size, F: tl.constexpr, BLOCK_F: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, PART: tl.constexpr = 0, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """(rows, COLS) products, in powers of 2, with sizes added; -inf for what is not seen."""
    dim = tl.arange(0, BLOCK_F)
    mask = seen[:, None]
    if F < BLOCK_F:
        mask = mask & (dim < F)[None, :]
    keys = tl.load(
        Keys + unit.to(tl.int64)[:, None] * (F * PARTS) + dim[None, :], mask=mask, other=0.0
    )  # fmt: skip
    logits = tl.dot(row, tl.trans(keys), input_precision=PRECISION) * LOG2E
    return logits + tl.where(seen, _log_sizes(size, UNIT, PART, PARTS), -float("inf"))[None, :]


@triton.jit(do_not_specialize=COUNTS)
def _two_stage_block_scores(
    Rows, Keys, Exists, Hull, Units, Parts, Out, Bias, TileKind, UnitKind, Tiles, Runs, Count,
    num_tiles, num_units, kv_heads, run_length, num_keys, lead, stride_k, stride_p, query_offset,
    GROUP: tl.constexpr, QUERY_POOLS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    F: tl.constexpr, BLOCK_F: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
    KINDS: tl.constexpr, BUCKETS: tl.constexpr, LARGEST: tl.constexpr, BIASED: tl.constexpr,
    PARTS: tl.constexpr, COARSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile: sums over its runs first, then shares. Its rows fill a small product alone."""
    tile = tl.program_id(0)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    own = batch * num_tiles + tile
    list_ = (batch * kv_heads + head) * num_tiles + tile
    Units += batch * num_units * 2
    Keys += (batch * kv_heads + head) * stride_k
    Parts += (batch * kv_heads + head) * stride_p
    Runs += list_ * run_length
    Out += list_ * run_length * COARSE
    low, high = tl.load(Hull + own * 2), tl.load(Hull + own * 2 + 1)
    count = tl.load(Count + list_) * COARSE
    member = tl.arange(0, ROWS)
    g, s = member // QUERY_POOLS, member % QUERY_POOLS
    exists = member < GROUP * QUERY_POOLS
    exists &= tl.load(Exists + own * QUERY_POOLS + s, mask=exists, other=0).to(tl.int1)
    dim = tl.arange(0, BLOCK_F)
    mask = exists[:, None]
    if F < BLOCK_F:
        mask = mask & (dim < F)[None, :]
    place = ((batch * kv_heads + head) * GROUP + g) * num_tiles + tile
    row = tl.load(
        Rows + (place * QUERY_POOLS + s)[:, None] * F + dim[None, :], mask=mask, other=0.0
    )  # fmt: skip
    # Each column keeps sums of its own, which are added up behind the loop.
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for at in range(0, count, COLS):
        unit, size, seen = _units_of(
            Runs, at, count, Units, num_units, num_keys, lead, low, high, COLS, UNIT, EVEN, COARSE
        )
        logits = _products(row, Keys, unit, seen, size, F, BLOCK_F, UNIT, PRECISION)
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp2(top - shift)[:, None] + tl.exp2(logits - shift[:, None])
        top = new_top
    sums = tl.sum(total, 1)
    some = sums > 0
    lse = tl.where(some, top + tl.log2(tl.where(some, sums, 1.0)), 0.0)
    # A row that does not exist gives nothing to anyone.
    lse = tl.where(exists, lse, float("inf"))
    members = tl.maximum(tl.sum(exists.to(tl.float32), 0), 1.0)
    for at in range(0, count, COLS):
        unit, size, seen = _units_of(
            Runs, at, count, Units, num_units, num_keys, lead, low, high, COLS, UNIT, EVEN, COARSE
        )
        if PARTS > 1:
            # As in `_block_scores`: what is under 2^-126 of the attention counts as nothing.
            given = tl.zeros([ROWS, COLS], tl.float32)
            for part in tl.static_range(PARTS):
                logits = _products(
                    row, Parts + part * F, unit, seen, size, F, BLOCK_F, UNIT, PRECISION, part,
                    PARTS,
                )  # fmt: skip
                given += tl.exp2(tl.minimum(logits - lse[:, None], 100.0))
            if LARGEST:
                value = tl.max(given, 0) / PARTS
            else:
                value = tl.sum(given, 0) / PARTS / members
            value = tl.where(value > 0, tl.log2(tl.maximum(value, 1e-38)) * LN2, -1e30)
        else:
            logits = _products(row, Keys, unit, seen, size, F, BLOCK_F, UNIT, PRECISION)
            share = logits - lse[:, None]
            best = tl.max(share, 0)
            value = best
            if not LARGEST:
                shift = tl.where(best == -float("inf"), 0.0, best)
                summed = tl.sum(tl.exp2(share - shift[None, :]), 0)
                value = shift + tl.log2(tl.maximum(summed, 1e-30) / members)
            value = tl.where(best == -float("inf"), -1e30, value * LN2)
        if BIASED:
            one = tl.zeros([1], tl.int32)
            bias = distance_bias(
                Bias + head * KINDS * KINDS * BUCKETS, Tiles + batch * num_tiles * 2,
                TileKind + batch * num_tiles, UnitKind + batch * num_units, Units, one + tile,
                unit, seen[None, :], num_tiles, num_units, query_offset, KINDS, BUCKETS,
            )  # fmt: skip
            value += tl.reshape(bias, (COLS,))
        slot = at + tl.arange(0, COLS)
        tl.store(Out + slot, value, mask=slot < count)


def share_of_runs(
    rows: Tensor, keys: Tensor, exists: Tensor, tiles: Tensor, hull: Tensor, units: Tensor,
    unit: int, runs: tuple[Tensor, Tensor, int], *, largest: bool = False,
    bias: Tensor | None = None, tile_kind: Tensor | None = None, unit_kind: Tensor | None = None,
    query_offset: int = 0, lead: int = -1, num_keys: int = 0,
    parts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `score.share_of_units`, where a tile gives to the units of its runs alone.

    Args:
        runs: index (B, K, T, R) int32 and count (B, K, T) int32 of runs, ascending, and units of a
            run, a power of two; run r is the units [r * size, (r + 1) * size).
    Returns:
        (B, K, T, C) float32; what is behind the listed runs is not written.
    """
    batch, heads, num_tiles, query_pools, width = rows.shape
    kv_heads, num_units = keys.shape[1:3]
    index, count, coarse = runs
    size = (batch, kv_heads, num_tiles, index.shape[-1] * coarse)
    out = rows.new_empty(size, dtype=torch.float32)
    if not out.numel():
        return out
    group = heads // kv_heads
    itemsize = rows.element_size()
    padded = max(next_power_of_2(group * query_pools), 16)
    keys, stride_k = by_heads(keys)
    parts, stride_p = (keys, 0) if parts is None else by_heads(parts)
    launch(
        _two_stage_block_scores, (num_tiles, batch * kv_heads),
        rows.contiguous(), keys, exists.contiguous(), hull, units, parts, out,
        out if bias is None else bias.contiguous(), units if tile_kind is None else tile_kind,
        units if unit_kind is None else unit_kind, tiles, index, count, num_tiles, num_units,
        kv_heads, index.shape[-1], num_keys, lead, stride_k, stride_p, query_offset,
        GROUP=group, QUERY_POOLS=query_pools, ROWS=padded, COLS=COLS,
        F=width, BLOCK_F=max(next_power_of_2(width), 16), UNIT=unit, EVEN=lead >= 0,
        KINDS=1 if bias is None else bias.shape[1], BUCKETS=2 if bias is None else bias.shape[3],
        LARGEST=largest, BIASED=bias is not None,
        PARTS=1 if parts.dim() == 4 else parts.shape[3], COARSE=coarse,
        PRECISION="ieee" if itemsize == 4 else "tf32", num_warps=run_warps(padded, itemsize),
        num_stages=2,
    )  # fmt: skip
    return out


def run_warps(rows: int, itemsize: int) -> int:
    """One for every 16 rows of a tile, which fill a product; float32 runs out of registers."""
    return 4 if itemsize == 4 else min(max(rows // 16, 1), 4)

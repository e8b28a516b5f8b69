"""Descriptors of pieces, and the share that the sub-pools of a tile give to every unit.

B batch, H query heads, K KV heads, G = H / K, N tokens, D head dim, P pieces, S sub-pools,
T tiles, U units, F width of a descriptor, R rank of the learned part
"""

# Triton launches are subscripts of a jit function, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _finite(x):
    """Non-finite values count as zero: one bad token must not blur the ranking of the others."""
    return tl.where((x == x) & (tl.abs(x) < float("inf")), x, 0.0)


@triton.jit
def _pool(
    X, Table, Mean, High, Low, pieces, parts, heads, stride_b, stride_h, stride_n,
    WIDTH: tl.constexpr, D: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr, EXTREMES: tl.constexpr,
):  # fmt: skip
    """One part (WIDTH tokens) of one piece: its mean and, if asked, largest and smallest."""
    piece = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    table = Table + (batch * pieces + piece) * 2
    start, size = tl.load(table), tl.load(table + 1)
    row = tl.arange(0, BLOCK_W)
    offset = part * WIDTH + row
    exists = (row < WIDTH) & (offset < size)
    dim = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (dim < D)[None, :]
    token = (start + offset).to(tl.int64)
    x = tl.load(
        X + batch * stride_b + head * stride_h + token[:, None] * stride_n + dim[None, :],
        mask=mask, other=0.0,
    ).to(tl.float32)  # fmt: skip
    x = _finite(x)
    members = tl.sum(exists.to(tl.int32), 0)
    place = ((batch * heads + head) * pieces * parts + tl.program_id(0)) * D + dim
    mean = tl.sum(x, 0) / tl.maximum(members, 1)
    tl.store(Mean + place, mean.to(Mean.dtype.element_ty), mask=dim < D)
    if EXTREMES:
        high = tl.max(tl.where(exists[:, None], x, -float("inf")), 0)
        low = tl.min(tl.where(exists[:, None], x, float("inf")), 0)
        high, low = tl.where(members > 0, high, 0.0), tl.where(members > 0, low, 0.0)
        tl.store(High + place, high.to(High.dtype.element_ty), mask=dim < D)
        tl.store(Low + place, low.to(Low.dtype.element_ty), mask=dim < D)


def pool(
    x: Tensor, table: Tensor, size: int, parts: int = 1, extremes: bool = False
) -> tuple[Tensor, ...]:
    """Mean of every part of every piece, and its extremes; zero where nothing exists.

    Args:
        x: (B, H, N, D), the last dimension contiguous.
        table: (B, P, 2) int32, first token and length.
        size: most tokens in a piece.
        parts: runs of ceil(size / parts) tokens that a piece is cut into.
    Returns:
        (B, H, P, parts, D) in x's dtype: the mean, and with `extremes` largest and smallest.
    """
    batch, heads, _, dim = x.shape
    pieces, width = table.shape[1], -(-size // parts)
    shape = (batch, heads, pieces, parts, dim)
    results = tuple(x.new_empty(shape) for _ in range(3 if extremes else 1))
    mean, high, low = results if extremes else results * 3
    if mean.numel():
        _pool[(pieces * parts, batch * heads)](
            x, table, mean, high, low, pieces, parts, heads, *x.stride()[:3],
            WIDTH=width, D=dim, BLOCK_W=triton.next_power_of_2(width),
            BLOCK_D=triton.next_power_of_2(dim), EXTREMES=extremes, num_warps=4,
        )  # fmt: skip
    return results


@triton.jit
def _logits(
    row, low, high, Units, first, num_units, batch, u_base,
    F: tl.constexpr, BLOCK_F: tl.constexpr, UNIT: tl.constexpr, COLS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(rows, COLS) products with the units' sizes added, -inf where a tile sees nothing."""
    unit = first + tl.arange(0, COLS)
    there = unit < num_units
    dim = tl.arange(0, BLOCK_F)
    keys = tl.load(
        u_base + unit.to(tl.int64)[:, None] * F + dim[None, :],
        mask=there[:, None] & (dim < F)[None, :], other=0.0,
    )  # fmt: skip
    logits = tl.dot(row, tl.trans(keys), input_precision=PRECISION)
    table = Units + (batch * num_units + unit) * 2
    start = tl.load(table, mask=there, other=0)
    size = tl.load(table + 1, mask=there, other=0)
    seen = (start[None, :] < high[:, None]) & ((start + size)[None, :] > low[:, None])
    seen &= (size > 0)[None, :]
    bias = tl.log(tl.maximum(size, 1).to(tl.float32) / UNIT)
    return tl.where(seen, logits + bias[None, :], -float("inf"))


@triton.jit
def _share(
    Rows, Keys, Exists, Hull, Units, Out, Bias, TileKind, UnitKind, Tiles,
    num_tiles, num_units, kv_heads, query_offset,
    GROUP: tl.constexpr, SUBPOOLS: tl.constexpr, TILE_ROWS: tl.constexpr, TILES: tl.constexpr,
    COLS: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr, UNIT: tl.constexpr,
    KINDS: tl.constexpr, BUCKETS: tl.constexpr, LARGEST: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Two passes over the units: the rows' log-sum-exp, then the tiles' shares."""
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    index = tl.arange(0, TILES * TILE_ROWS)
    tile = tl.program_id(0) * TILES + index // TILE_ROWS
    member = index % TILE_ROWS
    g, s = member // SUBPOOLS, member % SUBPOOLS
    exists = (tile < num_tiles) & (member < GROUP * SUBPOOLS)
    exists &= tl.load(
        Exists + (batch * num_tiles + tile) * SUBPOOLS + s, mask=exists, other=0
    ).to(tl.int1)  # fmt: skip
    dim = tl.arange(0, BLOCK_F)
    place = ((batch * kv_heads + head) * GROUP + g) * num_tiles + tile
    row = tl.load(
        Rows + (place * SUBPOOLS + s)[:, None] * F + dim[None, :],
        mask=exists[:, None] & (dim < F)[None, :], other=0.0,
    )  # fmt: skip
    hull = Hull + (batch * num_tiles + tile) * 2
    low = tl.load(hull, mask=exists, other=0)
    high = tl.load(hull + 1, mask=exists, other=0)
    u_base = Keys + (batch * kv_heads + head) * num_units * F
    top = tl.full([TILES * TILE_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([TILES * TILE_ROWS], tl.float32)
    for first in range(0, num_units, COLS):
        logits = _logits(
            row, low, high, Units, first, num_units, batch, u_base,
            F, BLOCK_F, UNIT, COLS, PRECISION,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        top = new_top
    lse = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), 0.0)
    own = tl.program_id(0) * TILES + tl.arange(0, TILES)
    members = tl.sum(tl.reshape(exists.to(tl.float32), (TILES, TILE_ROWS)), 1)
    for first in range(0, num_units, COLS):
        logits = _logits(
            row, low, high, Units, first, num_units, batch, u_base,
            F, BLOCK_F, UNIT, COLS, PRECISION,
        )  # fmt: skip
        share = tl.where(exists[:, None], logits - lse[:, None], -float("inf"))
        share = tl.reshape(share, (TILES, TILE_ROWS, COLS))
        best = tl.max(share, 1)  # (TILES, COLS)
        value = best
        if not LARGEST:
            shift = tl.where(best == -float("inf"), 0.0, best)
            summed = tl.sum(tl.exp(share - shift[:, None, :]), 1)
            value = (
                shift
                + tl.log(tl.maximum(summed, 1e-30))
                - tl.log(tl.maximum(members, 1.0))[:, None]
            )
        value = tl.where(best == -float("inf"), -1e30, value)
        unit = first + tl.arange(0, COLS)
        mask = (own < num_tiles)[:, None] & (unit < num_units)[None, :]
        if BIASED:
            tiles = Tiles + (batch * num_tiles + own) * 2
            middle = tl.load(tiles, mask=own < num_tiles, other=0) + query_offset
            middle += tl.load(tiles + 1, mask=own < num_tiles, other=0) // 2
            units = Units + (batch * num_units + unit) * 2
            centre = tl.load(units, mask=unit < num_units, other=0)
            centre += tl.load(units + 1, mask=unit < num_units, other=0) // 2
            distance = middle[:, None] - centre[None, :]
            # floor(log2(n)) of n < 2^24 is the exponent of its float32; beyond is the last bucket.
            far = (tl.abs(distance) + 1).to(tl.float32)
            bucket = (far.to(tl.int32, bitcast=True) >> 23) - 127
            bucket = tl.minimum(bucket, BUCKETS // 2 - 1)
            bucket = tl.where(distance < 0, bucket + BUCKETS // 2, bucket)
            mine = tl.load(TileKind + batch * num_tiles + own, mask=own < num_tiles, other=0)
            theirs = tl.load(UnitKind + batch * num_units + unit, mask=unit < num_units, other=0)
            pair = tl.maximum(mine.to(tl.int32), 0)[:, None] * KINDS
            pair += tl.maximum(theirs.to(tl.int32), 0)[None, :]
            bias = Bias + (head * KINDS * KINDS + pair) * BUCKETS + bucket
            value += tl.load(bias, mask=mask, other=0.0)
        out = ((batch * kv_heads + head) * num_tiles + own)[:, None] * num_units + unit[None, :]
        tl.store(Out + out, value, mask=mask)


def share_blocks(tile_rows: int, width: int, itemsize: int) -> tuple[int, int]:
    """Tiles and units of a block; float32 runs out of registers and takes small ones."""
    rows = 64 if itemsize == 2 else 16
    return max(rows // tile_rows, 1), 16 if itemsize == 4 else 64 if width <= 128 else 32


def share_of_units(
    rows: Tensor, keys: Tensor, exists: Tensor, tiles: Tensor, hull: Tensor, units: Tensor,
    unit: int, *, largest: bool = False, bias: Tensor | None = None,
    tile_kind: Tensor | None = None, unit_kind: Tensor | None = None, query_offset: int = 0,
) -> Tensor:  # fmt: skip
    """Log of the mean (or largest) share that sub-pools give to a unit, biases added.

    Args:
        rows: (B, H, T, S, F) descriptors of sub-pools, scale included.
        keys: (B, K, U, F), of units, in the same dtype.
        exists: (B, T, S) bool.
        hull: (B, T, 2) int32, range of keys that a tile sees.
        bias: (K, kinds, kinds, buckets) float32 by kind of tile and unit and by distance.
        tile_kind, unit_kind: (B, T) and (B, U) int8.
    Returns:
        (B, K, T, U) float32; what a tile does not see holds -1e30 or so.
    """
    batch, heads, num_tiles, subpools, width = rows.shape
    kv_heads, num_units = keys.shape[1:3]
    group = heads // kv_heads
    tile_rows = triton.next_power_of_2(group * subpools)
    # The interpreter has no registers to run out of, and is slow on small blocks.
    itemsize = rows.element_size() if rows.is_cuda else 2
    together, cols = share_blocks(tile_rows, width, itemsize)
    out = rows.new_empty(batch, kv_heads, num_tiles, num_units, dtype=torch.float32)
    if not out.numel():
        return out
    table = out if bias is None else bias.contiguous()
    _share[(triton.cdiv(num_tiles, together), batch * kv_heads)](
        rows.contiguous(), keys.contiguous(), exists.contiguous(), hull, units, out, table,
        units if tile_kind is None else tile_kind, units if unit_kind is None else unit_kind,
        tiles, num_tiles, num_units, kv_heads, query_offset,
        GROUP=group, SUBPOOLS=subpools, TILE_ROWS=tile_rows, TILES=together, COLS=cols, F=width,
        BLOCK_F=max(triton.next_power_of_2(width), 16), UNIT=unit,
        KINDS=1 if bias is None else bias.shape[1], BUCKETS=2 if bias is None else bias.shape[3],
        LARGEST=largest, BIASED=bias is not None,
        PRECISION="ieee" if rows.dtype == torch.float32 else "tf32", num_warps=4, num_stages=2,
    )  # fmt: skip
    return out

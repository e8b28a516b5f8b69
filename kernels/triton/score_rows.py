"""What kernels that score units have in common: rows of tiles, what they see, and their sums.

B batch, H query heads, K KV heads, S query pools, T tiles, U units, F width of a descriptor
"""

# Triton launches are subscripts of a jit function, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false
import triton
import triton.language as tl

from mm_sparse.kernels.triton.primitives import fast_log2

LN2 = tl.constexpr(0.6931471805599453)
# Sums of runs of units that are added up at once.
TOGETHER = tl.constexpr(8)


@triton.jit
def rows_of(
    Rows, Exists, Hull, block, num_tiles, num_kv_heads, batch, head,
    GROUP: tl.constexpr, QUERY_POOLS: tl.constexpr, ORDER: tl.constexpr, F: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Rows of the tiles of a block in the order of `row_order`: values, range, existence."""
    T1: tl.constexpr = ORDER[1]
    PAIR: tl.constexpr = ORDER[2]
    T0: tl.constexpr = ORDER[3]
    LANES: tl.constexpr = ORDER[4]
    index = tl.arange(0, ORDER[0] * T1 * PAIR * T0 * LANES)
    within, above = index % (T0 * LANES), index // (T0 * LANES)
    member = (above // (T1 * PAIR) * PAIR + above % PAIR) * LANES + within % LANES
    tile = (block * T1 + above // PAIR % T1) * T0 + within // LANES
    g, s = member // QUERY_POOLS, member % QUERY_POOLS
    exists = (tile < num_tiles) & (member < GROUP * QUERY_POOLS)
    exists &= tl.load(
        Exists + (batch * num_tiles + tile) * QUERY_POOLS + s, mask=exists, other=0
    ).to(tl.int1)  # fmt: skip
    dim = tl.arange(0, BLOCK_F)
    place = ((batch * num_kv_heads + head) * GROUP + g) * num_tiles + tile
    mask = exists[:, None]
    if F < BLOCK_F:
        mask = mask & (dim < F)[None, :]
    row = tl.load(
        Rows + (place * QUERY_POOLS + s)[:, None] * F + dim[None, :], mask=mask, other=0.0
    )  # fmt: skip
    hull = Hull + (batch * num_tiles + tile) * 2
    low = tl.load(hull, mask=exists, other=0)
    return row, low, tl.load(hull + 1, mask=exists, other=0), exists


@triton.jit
def row_in_memory(batch, kv_heads, head, PAGE_UNITS: tl.constexpr):
    """Which run of descriptors those of a head are; sequences in pages share theirs."""
    if PAGE_UNITS > 0:
        return head
    else:
        return batch * kv_heads + head


@triton.jit
def seen_units(
    Units, low, high, exists, first, last, num_keys, lead, UNIT: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Range of the units [first, last) that some row sees, and of the keys that every row sees."""
    any_low = tl.min(tl.where(exists, low, 2147483647), 0)
    any_high = tl.max(tl.where(exists, high, 0), 0)
    all_low = tl.max(tl.where(exists, low, 0), 0)
    all_high = tl.min(tl.where(exists, high, 2147483647), 0)
    if EVEN:
        begin = tl.maximum(first, (tl.minimum(any_low, num_keys) + lead) // UNIT)
        end = tl.minimum(last, (any_high + lead + UNIT - 1) // UNIT)
    else:
        begin, end = last, first
        for at in range(first, last, 256):
            unit = at + tl.arange(0, 256)
            start = tl.load(Units + unit * 2, mask=unit < last, other=0)
            size = tl.load(Units + unit * 2 + 1, mask=unit < last, other=0)
            seen = (size > 0) & (start < any_high) & (start + size > any_low)
            begin = tl.minimum(begin, tl.min(tl.where(seen, unit, last), 0))
            end = tl.maximum(end, tl.max(tl.where(seen, unit + 1, first), 0))
    return begin, end, all_low, all_high


@triton.jit
def over_members(x, LARGEST: tl.constexpr):
    """(OUTER, T1, PAIR, T0, LANES, COLS) -> (1, T1, 1, T0, 1, COLS), registers before lanes."""
    if LARGEST:
        x = tl.max(tl.max(x, 0, keep_dims=True), 2, keep_dims=True)
        return tl.max(x, 4, keep_dims=True)
    else:
        x = tl.sum(tl.sum(x, 0, keep_dims=True), 2, keep_dims=True)
        return tl.sum(x, 4, keep_dims=True)


@triton.jit
def log_of_share(share):
    """Log of a share; what is under 2^-126 of the attention counts as nothing."""
    log = fast_log2(tl.minimum(tl.maximum(share, 1.2e-38), 3e38)) * LN2
    return tl.where(share > 0, log, -1e30)


@triton.jit
def distance_bias(
    Bias, Tiles, TileKind, UnitKind, Units, own, unit, mask, num_tiles, num_units, query_offset,
    KINDS: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """(TILES, COLS) biases of pairs of modalities at the distance of tile and unit."""
    tiles = Tiles + own * 2
    middle = tl.load(tiles, mask=own < num_tiles, other=0) + query_offset
    middle += tl.load(tiles + 1, mask=own < num_tiles, other=0) // 2
    centre = tl.load(Units + unit * 2, mask=unit < num_units, other=0)
    centre += tl.load(Units + unit * 2 + 1, mask=unit < num_units, other=0) // 2
    distance = middle[:, None] - centre[None, :]
    # floor(log2(n)) of n < 2^24 is the exponent of its float32; beyond is the last bucket.
    far = (tl.abs(distance) + 1).to(tl.float32)
    bucket = (far.to(tl.int32, bitcast=True) >> 23) - 127
    bucket = tl.minimum(bucket, BUCKETS // 2 - 1)
    bucket = tl.where(distance < 0, bucket + BUCKETS // 2, bucket)
    mine = tl.load(TileKind + own, mask=own < num_tiles, other=0)
    theirs = tl.load(UnitKind + unit, mask=unit < num_units, other=0)
    pair = tl.maximum(mine.to(tl.int32), 0)[:, None] * KINDS
    pair += tl.maximum(theirs.to(tl.int32), 0)[None, :]
    return tl.load(Bias + pair * BUCKETS + bucket, mask=mask, other=0.0)


@triton.jit
def deny(Out, own, first, last, num_tiles, row_length, COLS: tl.constexpr):
    """Scores of the units [first, last), which no tile of the program sees."""
    for at in range(first, last, COLS):
        unit = at + tl.arange(0, COLS)
        out = Out + own.to(tl.int64)[:, None] * row_length + unit[None, :]
        value = tl.full([own.shape[0], COLS], -1e30, tl.float32)
        tl.store(out, value, mask=(own < num_tiles)[:, None] & (unit < last)[None, :])


@triton.jit
def sum_of_splits(sums, exists, splits, ROWS: tl.constexpr):
    """Log2 of what each row gives to all units, from the sums of its chunks."""
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for i in range(0, splits, TOGETHER):
        run = i + tl.arange(0, TOGETHER)
        some = tl.load(
            sums + run[:, None] * ROWS + tl.arange(0, ROWS)[None, :],
            mask=(run < splits)[:, None], other=-float("inf"),
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(some, 0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(some - shift[None, :]), 0)
        top = new_top
    some = total > 0
    lse = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), 0.0)
    # A row that does not exist gives nothing to anyone.
    return tl.where(exists, lse, float("inf"))

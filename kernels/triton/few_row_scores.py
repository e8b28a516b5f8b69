"""Scores of units for the few rows of a step of decoding: descriptors are read once.

The sums that shares are of are known behind the last unit. Of few rows logits are smaller than the
descriptors that they come from, so that one kernel writes them and another makes shares of them.

B batch, H query heads, K KV heads, G = H / K, S query pools, T tiles, U units, C parts of a unit,
F width of a descriptor
"""

# Triton launches are subscripts of a jit function, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl

from mm_sparse.kernels.triton.primitives import COUNTS, LOG2E, even_units
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

# Columns of a product, units times their parts, in 16-bit numbers and in float32.
COLUMNS, WIDE_COLUMNS = 128, 32
# Units of which the logits are read at once.
READ_UNITS = 256


@triton.jit(do_not_specialize=COUNTS)
def few_row_logits(
    Rows, Parts, Exists, Hull, Units, Sums, Logits, PageTable, num_tiles, num_units, kv_heads,
    chunk, num_keys, lead, stride_p, row_length, stride_pages, GROUP: tl.constexpr,
    QUERY_POOLS: tl.constexpr, ORDER: tl.constexpr, COLS: tl.constexpr, F: tl.constexpr,
    BLOCK_F: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, PAGE_UNITS: tl.constexpr, PAGE_STRIDE: tl.constexpr,
):  # fmt: skip
    """Log2 of what rows give to the parts of each unit of a chunk, and to the chunk's units.

    The former adds up powers of the parts; the latter takes a unit whole, whose product is the mean
    of those of its parts.
    """
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    split = tl.program_id(0)
    Units += batch * num_units * 2
    Parts += row_in_memory(batch, kv_heads, head, PAGE_UNITS) * stride_p
    if PAGE_UNITS > 0:
        PageTable += batch * stride_pages
    row, low, high, exists = rows_of(
        Rows, Exists, Hull, 0, num_tiles, kv_heads, batch, head, GROUP, QUERY_POOLS, ORDER, F,
        BLOCK_F,
    )  # fmt: skip
    first = split * chunk
    begin, end, _all_low, _all_high = seen_units(
        Units, low, high, exists, first, tl.minimum(first + chunk, num_units), num_keys, lead,
        UNIT, EVEN,
    )  # fmt: skip
    ROWS: tl.constexpr = ORDER[0] * ORDER[1] * ORDER[2] * ORDER[3] * ORDER[4]
    WIDTH: tl.constexpr = (UNIT + PARTS - 1) // PARTS
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    reached = tl.max(high, 0)
    dim = tl.arange(0, BLOCK_F)
    line = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for at in range(begin // COLS * COLS, end, COLS):
        column = tl.arange(0, COLS * PARTS)
        unit = at + column // PARTS
        there = unit < num_units
        place = unit
        if PAGE_UNITS > 0:
            # Pages behind the last one that a row sees have no entry.
            there = there & (unit * UNIT < reached)
            page = tl.load(PageTable + unit // PAGE_UNITS, mask=there, other=0)
            place = page * PAGE_STRIDE + unit % PAGE_UNITS
        mask = there[:, None]
        if F < BLOCK_F:
            mask = mask & (dim < F)[None, :]
        described = tl.load(
            Parts + (place.to(tl.int64) * PARTS + column % PARTS)[:, None] * F + dim[None, :],
            mask=mask, other=0.0,
        )  # fmt: skip
        product = tl.dot(row, tl.trans(described), input_precision=PRECISION) * LOG2E
        product = tl.reshape(product, (ROWS, COLS, PARTS))
        unit = at + tl.arange(0, COLS)
        if EVEN:
            start, size = even_units(unit, lead, num_keys, UNIT)
            size = tl.where(unit < num_units, size, 0)
        else:
            start = tl.load(Units + unit * 2, mask=unit < num_units, other=0)
            size = tl.load(Units + unit * 2 + 1, mask=unit < num_units, other=0)
        seen = (start[None, :] < high[:, None]) & ((start + size)[None, :] > low[:, None])
        seen = seen & (size > 0)[None, :]
        keys = tl.maximum(size, 1)
        part = tl.arange(0, PARTS)
        members = tl.minimum(tl.maximum(size[:, None] - part[None, :] * WIDTH, 0), WIDTH)
        share = (members.to(tl.float32) / keys.to(tl.float32)[:, None])[None, :, :]
        whole = tl.sum(product * share, 2) + tl.log2(keys.to(tl.float32) / UNIT)[None, :]
        whole = tl.where(seen, whole, -float("inf"))
        given = whole
        if PARTS > 1:
            size_of_part = tl.log2(tl.maximum(members, 1).to(tl.float32) / WIDTH)
            size_of_part = tl.where(members > 0, size_of_part, -float("inf"))
            given = product + size_of_part[None, :, :]
            best = tl.max(given, 2)
            shift = tl.where(best == -float("inf"), 0.0, best)
            # A unit that is seen has a part with keys, which alone gives one.
            given = tl.sum(tl.exp2(given - shift[:, :, None]), 2)
            given = shift + tl.log2(tl.maximum(given, 1.0))
            given = tl.where(seen, given, -float("inf"))
        tl.store(
            Logits + line[:, None] * row_length + unit[None, :], given,
            mask=exists[:, None] & (unit < num_units)[None, :],
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(whole, 1))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(whole - shift[:, None]), 1)
        top = new_top
    sums = Sums + (tl.program_id(1) * tl.num_programs(0) + split).to(tl.int64) * ROWS
    tl.store(sums + tl.arange(0, ROWS), top + tl.log2(tl.where(total > 0, total, 1.0)))


@triton.jit(do_not_specialize=COUNTS)
def few_row_shares(
    Rows, Exists, Hull, Units, Sums, Logits, Out, Bias, TileKind, UnitKind, Tiles, num_tiles,
    num_units, kv_heads, splits, chunk, num_keys, lead, row_length, query_offset,
    GROUP: tl.constexpr, QUERY_POOLS: tl.constexpr, ORDER: tl.constexpr, COLS: tl.constexpr,
    READ: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr, UNIT: tl.constexpr,
    EVEN: tl.constexpr, PARTS: tl.constexpr, KINDS: tl.constexpr, BUCKETS: tl.constexpr,
    LARGEST: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Shares that tiles give to a chunk of units, from logits in blocks of COLS units."""
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    split = tl.program_id(0)
    Units += batch * num_units * 2
    Out += (batch * kv_heads + head) * num_tiles * row_length
    _row, low, high, exists = rows_of(
        Rows, Exists, Hull, 0, num_tiles, kv_heads, batch, head, GROUP, QUERY_POOLS, ORDER, F,
        BLOCK_F,
    )  # fmt: skip
    ROWS: tl.constexpr = ORDER[0] * ORDER[1] * ORDER[2] * ORDER[3] * ORDER[4]
    TILES: tl.constexpr = ORDER[1] * ORDER[3]
    sums = Sums + (tl.program_id(1) * splits).to(tl.int64) * ROWS
    lse = sum_of_splits(sums, exists, splits, ROWS)
    members = tl.reshape(
        exists.to(tl.float32), (ORDER[0], ORDER[1], ORDER[2], ORDER[3], ORDER[4], 1)
    )  # fmt: skip
    per_member = 1.0 / (tl.maximum(over_members(members, False), 1.0) * PARTS)
    own = tl.arange(0, TILES)
    first = split * chunk
    last = tl.minimum(first + chunk, num_units)
    begin, end, _all_low, _all_high = seen_units(
        Units, low, high, exists, first, last, num_keys, lead, UNIT, EVEN
    )
    begin = tl.minimum(begin, last) // COLS * COLS
    deny(Out, own, first, begin, num_tiles, row_length, COLS)
    # Rows are longer than their units, so that numbers are read and written together.
    stop = tl.where(last == num_units, row_length, last)
    known = tl.minimum((end + COLS - 1) // COLS * COLS, last)
    line = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for at in range(begin, end, READ):
        unit = at + tl.arange(0, READ)
        given = tl.load(
            Logits + line[:, None] * row_length + unit[None, :],
            mask=exists[:, None] & (unit < known)[None, :], other=-float("inf"),
        )  # fmt: skip
        share = tl.reshape(
            given - lse[:, None], (ORDER[0], ORDER[1], ORDER[2], ORDER[3], ORDER[4], READ)
        )  # fmt: skip
        if LARGEST:
            best = over_members(share, True)
            none = best == -float("inf")
            value = tl.where(none, -1e30, best * LN2 - tl.log(PARTS * 1.0))
        else:
            value = log_of_share(over_members(tl.exp2(share), False) * per_member)
        value = tl.reshape(value, (TILES, READ))
        if BIASED:
            mask = (own < num_tiles)[:, None] & (unit < num_units)[None, :]
            value += distance_bias(
                Bias + head * KINDS * KINDS * BUCKETS, Tiles + batch * num_tiles * 2,
                TileKind + batch * num_tiles, UnitKind + batch * num_units, Units,
                own, unit, mask, num_tiles, num_units, query_offset, KINDS, BUCKETS,
            )  # fmt: skip
        out = Out + own.to(tl.int64)[:, None] * row_length + unit[None, :]
        tl.store(out, value, mask=(own < num_tiles)[:, None] & (unit < stop)[None, :])
    behind = begin + (tl.maximum(end - begin, 0) + READ - 1) // READ * READ
    deny(Out, own, behind, last, num_tiles, row_length, COLS)


def units_of_block(parts: int, itemsize: int) -> int:
    """Units whose parts are the columns of one product."""
    return max((WIDE_COLUMNS if itemsize == 4 else COLUMNS) // parts, 8)

"""Pieces that more than one Triton kernel needs.

R rows of a tile (tokens times query heads of a KV group), C keys of a block,
D head dim (padded to a power of two)
"""

# Names of a kernel's constants, which pyright cannot follow.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mm_sparse.kernels.device import generation, interpreted

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(interpreted())
# Numbers that differ from call to call. Triton compiles a kernel anew for numbers that are 1 or
# divide by 16: with batches of any length it would do so for most of a training run's first hour.
ROW_COUNTS = (
    "num_queries", "num_keys", "num_tiles", "list_length", "drawn_length", "all_length", "items",
    "pieces", "queries", "query_offset", "rows", "splits", "parts", "keys_of_part", "chunk",
    "chunks", "run_length", "lead", "tile_lead", "groups", "stride_pages",
)  # fmt: skip
COUNTS = (*ROW_COUNTS, "num_units")
"""`_keep` reads tables of `num_units` rows, and is faster where these are aligned."""


@triton.jit
def fast_log2(x):
    """Of numbers that are not subnormal, to 22 bits: one instruction, not some twenty."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def tile_rows(
    Tiles, tile, first, GROUP: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """Query token, head in its group and existence of rows of a tile.

    `tile` is (row of the table, number in its batch row); regular tiles need no look-up.
    """
    row = first + tl.arange(0, ROWS)
    if REGULAR:
        start = (tile[1] * TOKENS).to(tl.int32)
        length = TOKENS
    else:
        start = tl.load(Tiles + tile[0] * 2)
        length = tl.load(Tiles + tile[0] * 2 + 1)
    return start + row // GROUP, row % GROUP, row // GROUP < length


@triton.jit
def row_span(Span, token, exists, num_queries, batch):
    """Half-open range of keys that each row sees."""
    span = Span + (batch * num_queries + token) * 2
    low = tl.load(span, mask=exists, other=0)
    return low, tl.load(span + 1, mask=exists, other=0)


@triton.jit
def even_units(unit, lead, num_keys, UNIT: tl.constexpr):
    """First key and length of units of which all but the first and the last are whole."""
    start = unit * UNIT - lead
    size = tl.minimum(start + UNIT, num_keys)
    start = tl.maximum(start, 0)
    return start, size - start


@triton.jit
def listed_units(Index, first, count, UNIT: tl.constexpr, COLS: tl.constexpr):
    """Unit of columns `first`, `first + 1`, ... of a list; one number if all are of one unit."""
    slot = first // UNIT
    if COLS > UNIT:
        slot += tl.arange(0, COLS) // UNIT
    return tl.load(Index + slot, mask=slot < count, other=0).to(tl.int32)


@triton.jit
def place_of_unit(Pages, unit, PAGE_UNITS: tl.constexpr, PAGE_STRIDE: tl.constexpr):
    """Where a unit of a sequence in pages stands in memory, in units; itself without pages."""
    if Pages is None:
        return unit
    else:
        page = tl.load(Pages + unit // PAGE_UNITS)
        return page * PAGE_STRIDE + unit % PAGE_UNITS


@triton.jit
def unit_keys(
    unit, Units, first, count, UNIT: tl.constexpr, COLS: tl.constexpr, REGULAR: tl.constexpr
):
    """Key token of columns `first`, `first + 1`, ..., whose units are `unit`; which exist."""
    column = first + tl.arange(0, COLS)
    listed = column // UNIT < count
    if REGULAR:
        start = unit * UNIT
    else:
        start = tl.load(Units + unit.to(tl.int64) * 2)
        listed = listed & (column % UNIT < tl.load(Units + unit.to(tl.int64) * 2 + 1))
    return start + column % UNIT, listed


@triton.jit
def load_block(Described, batch, head, token, LENGTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """(LENGTH, D) rows from `token` on of a tensor that `describe` described; zeros behind it."""
    block = Described.load([batch.to(tl.int32), head.to(tl.int32), token, 0])
    return tl.reshape(block, (LENGTH, BLOCK_D))


@triton.jit
def load_rows(
    Base, token, head, exists, stride_head, stride_token,
    ALL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(R, D) rows of q-like tensors; rows that do not exist (none if ALL) are zero."""
    dim = tl.arange(0, BLOCK_D)
    pointer = Base + head.to(tl.int64)[:, None] * stride_head
    pointer += token.to(tl.int64)[:, None] * stride_token + dim[None, :]
    return _load(pointer, exists, dim, ALL, D, BLOCK_D)


@triton.jit
def load_keys(
    Base, key, exists, stride_token, ALL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """(C, D) rows of k-like tensors of one head; keys that do not exist (none if ALL) are zero."""
    dim = tl.arange(0, BLOCK_D)
    pointer = Base + key.to(tl.int64)[:, None] * stride_token + dim[None, :]
    return _load(pointer, exists, dim, ALL, D, BLOCK_D)


@triton.jit
def _load(pointer, exists, dim, ALL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    if ALL and D == BLOCK_D:
        rows = tl.load(pointer)
    elif ALL:
        rows = tl.load(pointer, mask=(dim < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        rows = tl.load(pointer, mask=exists[:, None], other=0.0)
    else:
        rows = tl.load(pointer, mask=exists[:, None] & (dim < D)[None, :], other=0.0)
    return rows


@triton.jit
def softmax_step(
    q, top, total, acc, Kd, Vd, Kb, Vb, Ub, unit, place, batch, head, first, count, low, high,
    scale2, stride_kn, stride_vn, MASKED: tl.constexpr, REGULAR: tl.constexpr, UNIT: tl.constexpr,
    COLS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    PAGED: tl.constexpr,
):  # fmt: skip
    """One block of keys: online softmax, scores in base 2 (Milakov and Gimelshein, 2018).

    `place` is where the units stand in memory, in units; of keys in pages these are regular.
    """
    ALL: tl.constexpr = REGULAR and not MASKED
    key, exists = unit_keys(unit, Ub, first, count, UNIT, COLS, REGULAR)
    row = key
    if PAGED:
        row = place * UNIT + (first + tl.arange(0, COLS)) % UNIT
        # Behind the end of a sequence a page may hold anything, and 0 x NaN is NaN.
        exists = exists & (key < tl.max(high, 0))
    if ALL and Kd is not None:
        k = load_block(Kd, batch, head, place * UNIT + first % UNIT, COLS, BLOCK_D)
    else:
        k = load_keys(Kb, row, exists, stride_kn, ALL, D, BLOCK_D)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        seen = exists[None, :] & (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
        score = tl.where(seen, score, -float("inf"))
    elif not REGULAR:
        score = tl.where(exists[None, :], score, -float("inf"))
    new_top = tl.maximum(top, tl.max(score, 1) * scale2)
    # A row that has seen nothing yet keeps -inf as its top; exp2(-inf - 0) is 0, never NaN.
    shift = new_top
    if not ALL:
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    weight = tl.exp2(score * scale2 - shift[:, None])
    decay = tl.exp2(top - shift)
    if ALL and Vd is not None:
        v = load_block(Vd, batch, head, place * UNIT + first % UNIT, COLS, BLOCK_D)
    else:
        v = load_keys(Vb, row, exists, stride_vn, ALL, D, BLOCK_D)
    total = total * decay + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def count_below(
    Index, Units, count, bound, AT_END: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr
):
    """How many units of a list start below `bound`, or (AT_END) end at or below it.

    With WHOLE, unit u ends so many keys behind u * WHOLE, whether they exist or not.
    """
    total = 0
    for first in range(0, count, WIDTH):
        slot = first + tl.arange(0, WIDTH)
        listed = slot < count
        unit = tl.load(Index + slot, mask=listed, other=0).to(tl.int64)
        if WHOLE > 0:
            edge = unit * WHOLE
        else:
            edge = tl.load(Units + unit * 2, mask=listed, other=0)
        if AT_END:
            if WHOLE > 0:
                edge += WHOLE
            else:
                edge += tl.load(Units + unit * 2 + 1, mask=listed, other=0)
            total += tl.sum((listed & (edge <= bound)).to(tl.int32), 0)
        else:
            total += tl.sum((listed & (edge < bound)).to(tl.int32), 0)
    return total


@triton.jit
def unmasked_columns(
    Index, Units, count, low, high, exists, UNIT: tl.constexpr, COLS: tl.constexpr,
    PAGED: tl.constexpr,
):  # fmt: skip
    """Range of list columns, in whole blocks, that the visible range of no row cuts."""
    all_from = tl.max(tl.where(exists, low, 0), 0)
    all_to = tl.min(tl.where(exists, high, 2147483647), 0)
    WHOLE: tl.constexpr = UNIT if PAGED else 0
    begin = count_below(Index, Units, count, all_from, False, 512, WHOLE) * UNIT
    end = count_below(Index, Units, count, all_to, True, 512, WHOLE) * UNIT
    begin = (begin + COLS - 1) // COLS * COLS
    return begin, tl.maximum(begin, end // COLS * COLS)


def describable(x: Tensor) -> bool:
    """Whether the copy engine of Hopper and later can load rows of a (B, H, N, D) tensor."""
    if generation(x) < 9 or x.element_size() == 4 or not x.numel():
        return False
    aligned = all(n > 0 and n * x.element_size() % 16 == 0 for n in x.stride()[:-1])
    return aligned and x.data_ptr() % 16 == 0


def describe(x: Tensor, rows: int, block_d: int, heads: int = 1) -> TensorDescriptor | None:
    """For loads of (heads * rows, D) at once by the copy engine; None if it cannot."""
    if not describable(x):
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, heads, rows, block_d])

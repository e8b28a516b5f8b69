"""What kernels for Hopper share: sorted lists, blocks of keys and values copied, rows of a tile.

Written in Gluon for those that run warp-specialised; `sort_lists` is a plain Triton kernel before.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim, T tiles, U units,
L list length
"""

# Names of a kernel's constants, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportOperatorIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mm_sparse.kernels.cached_launch import launch
from mm_sparse.kernels.sizes import all_whole, index_dtype, next_power_of_2
from mm_sparse.kernels.triton.primitives import COUNTS, row_span, tile_rows

LOG2E = gl.constexpr(1.4426950408889634)
FLAT = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
BOXED = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=4))
ONE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@triton.jit(do_not_specialize=COUNTS)
def sort_lists(
    Order, Inner, Begun, Tiles, Units, Span, Index, Count, num_queries, num_tiles, num_units,
    list_length, kv_heads, lead, TOKENS: tl.constexpr, LENGTH: tl.constexpr, UNIT: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr, REGULAR_TILES: tl.constexpr,
):  # fmt: skip
    """A list's units that need no mask from the front, the others from the back of its places.

    Of even units those that need one are the first and the last of a list: it stays as it is, and
    is told how many come first.
    """
    t = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    batch = group // kv_heads
    token, _, exists = tile_rows(
        Tiles, (batch * num_tiles + t, t), 0, 1, LENGTH, TOKENS, REGULAR_TILES
    )
    low, high = row_span(Span, token, exists, num_queries, batch)
    all_from = tl.max(tl.where(exists, low, 0), 0)
    all_to = tl.min(tl.where(exists, high, 2147483647), 0)
    list_ = group * num_tiles + t
    count = tl.load(Count + list_)
    inner, others = 0, 0
    for first in range(0, count, WIDTH):
        slot = first + tl.arange(0, WIDTH)
        listed = slot < count
        unit = tl.load(Index + list_ * list_length + slot, mask=listed, other=0).to(tl.int32)
        if EVEN:
            start = unit * UNIT - lead
            whole = listed & (start >= all_from) & (start + UNIT <= all_to)
            others += tl.sum((listed & (start < all_from)).to(tl.int32), 0)
        else:
            table = Units + (batch * num_units + unit) * 2
            start = tl.load(table, mask=listed, other=0)
            size = tl.load(table + 1, mask=listed, other=0)
            whole = listed & (size == UNIT) & (start >= all_from) & (start + size <= all_to)
            cut = listed & ~whole
            place = inner + tl.cumsum(whole.to(tl.int32), 0) - 1
            back = list_length - others - tl.cumsum(cut.to(tl.int32), 0)
            place = Order + list_ * list_length + tl.where(whole, place, back)
            tl.store(place, unit.to(Order.dtype.element_ty), mask=listed)
            others += tl.sum(cut.to(tl.int32), 0)
        inner += tl.sum(whole.to(tl.int32), 0)
    if list_ == 0:
        # For the kernel behind: nobody has begun a tile yet.
        tl.store(Begun, 0)
    tl.store(Inner + list_ * 2, inner)
    tl.store(Inner + list_ * 2 + 1, others)


@gluon.jit
def make_queue(readers: gl.constexpr):
    """Places of tiles, on their way from the warp that draws them to `readers` groups of warps.

    Lists differ in length, by causality or by budgets of heads: who is done takes the next.
    """
    places = gl.allocate_shared_memory(gl.int32, [6, 1], ONE)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=readers)
    return places, ready, free


@gluon.jit
def offer(queue, turn, item, sizes):
    """Hand the place of a work item on, as the one warp that draws them; returns it.

    Batch, KV head, and number of the tile: late ones, of long lists if causal, come first, and
    behind the last item it is -1. Divisions by what is no constant are here alone: a kernel of
    many parts has little room.
    """
    places, ready, free = queue
    items, num_tiles, kv_heads = sizes[0], sizes[3], sizes[6]
    group = item // num_tiles
    batch = group // kv_heads
    head = group - batch * kv_heads
    t = gl.where(item < items, num_tiles - 1 - (item - group * num_tiles), -1)
    slot = turn % 2
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    nothing = gl.zeros([1], gl.int32, layout)
    mbarrier.wait(free.index(slot), turn // 2 % 2 ^ 1)
    places.index(slot * 3).store(nothing + batch)
    places.index(slot * 3 + 1).store(nothing + head)
    places.index(slot * 3 + 2).store(nothing + t)
    gl.thread_barrier()
    mbarrier.arrive(ready.index(slot))
    return batch, head, t


@gluon.jit
def take(queue, turn, WARPS: gl.constexpr):
    """Place of the next tile, as `offer` has it."""
    places, ready, free = queue
    slot = turn % 2
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    mbarrier.wait(ready.index(slot), turn // 2 % 2)
    batch = gl.max(places.index(slot * 3).load(layout), 0)
    head = gl.max(places.index(slot * 3 + 1).load(layout), 0)
    t = gl.max(places.index(slot * 3 + 2).load(layout), 0)
    gl.thread_barrier()
    mbarrier.arrive(free.index(slot))
    return batch, head, t


@gluon.jit
def one_list(batch, head, t, tables, sizes, UNIT: gl.constexpr, COLS: gl.constexpr):
    """List of a tile, its units without a mask, blocks of those, all blocks, all units.

    Behind the number of its units without a mask, that of those that stand before them.
    """
    _tiles, _units, _span, _order, Inner, Count = tables
    num_tiles, kv_heads = sizes[3], sizes[6]
    list_ = (batch * kv_heads + head) * num_tiles + t
    inner = gl.load(Inner + list_ * 2)
    ahead = gl.load(Inner + list_ * 2 + 1)
    count = gl.load(Count + list_)
    main = inner * UNIT // COLS
    left = count * UNIT - main * COLS
    return list_.to(gl.int64), (inner, ahead), main, main + (left + COLS - 1) // COLS, count


@gluon.jit
def place_of(slot, inner, list_length, EVEN: gl.constexpr):
    """Where the unit of a slot stands: those that need no mask have the first slots."""
    whole, ahead = inner
    if EVEN:
        return slot + gl.where(slot < whole, ahead, gl.where(slot < whole + ahead, -whole, 0))
    else:
        return gl.where(slot < whole, slot, list_length - 1 - (slot - whole))


@gluon.jit
def first_of_unit(unit, batch, tables, sizes, UNIT: gl.constexpr, EVEN: gl.constexpr):
    """Its first key."""
    _tiles, Units, _span, _order, _inner, _count = tables
    num_units, lead = sizes[4], sizes[7]
    unit = unit.to(gl.int32)
    if EVEN:
        return unit * UNIT - lead
    else:
        return gl.load(Units + (batch.to(gl.int64) * num_units + unit) * 2)


@gluon.jit
def rows_of_boxes(
    j, batch, list_, inner, count, tables, sizes, UNIT: gl.constexpr, COLS: gl.constexpr,
    EVEN: gl.constexpr,
):  # fmt: skip
    """First key of each unit (or part of one) of a block; behind all keys where none is listed."""
    num_keys, list_length = sizes[2], sizes[5]
    PIECE: gl.constexpr = UNIT if UNIT < COLS else COLS
    ids = tables[3] + list_ * list_length
    slot = j * COLS // UNIT
    rows = ()
    for p in gl.static_range(COLS // PIECE):
        listed = slot + p < count
        unit = gl.load(ids + place_of(slot + p, inner, list_length, EVEN), mask=listed, other=0)
        start = first_of_unit(unit, batch, tables, sizes, UNIT, EVEN)
        # What lies before the first key or behind the last arrives as zeros.
        row = gl.where(listed, start + j * COLS % UNIT, num_keys)
        rows = rows + (row,)  # noqa: RUF005
    return rows


@gluon.jit
def copy_blocks(
    worker: gl.constexpr, workers: gl.constexpr, Begun, queue, Described, pieces, ready, free,
    tables, sizes, UNIT: gl.constexpr, COLS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    EVEN: gl.constexpr,
):  # fmt: skip
    """Copies the blocks of keys, or of values, of one tile after the other.

    With `Begun`, how many tiles were begun beyond the first of each program, it draws them.
    """
    step, turn = 0, 0
    if Begun is not None:
        batch, head, t = offer(queue, turn, gl.program_id(0) * workers + worker, sizes)
    else:
        batch, head, t = take(queue, turn, 1)
    while t >= 0:
        list_, inner, main, total, count = one_list(batch, head, t, tables, sizes, UNIT, COLS)
        place = (batch, head, list_, inner, count)
        turn += 1
        last = gl.minimum(main, gl.maximum(total - 1, 0))
        step = _copy_inner(
            last, step, place, Described, pieces, ready, free, tables, sizes, UNIT, COLS, D,
            STAGES, EVEN,
        )  # fmt: skip
        if Begun is not None:
            # Not before: who draws early may turn out to be slow. Not behind: it takes a while.
            item = gl.atomic_add(Begun, 1, sem="relaxed") + gl.num_programs(0) * workers
        step = _copy_outer(
            last, total, step, place, Described, pieces, ready, free, tables, sizes, UNIT, COLS, D,
            STAGES, EVEN,
        )  # fmt: skip
        if Begun is not None:
            batch, head, t = offer(queue, turn, item, sizes)
        else:
            batch, head, t = take(queue, turn, 1)


@gluon.jit
def _copy_inner(
    end, step, place, Described, pieces, ready, free, tables, sizes, UNIT: gl.constexpr,
    COLS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Copies the first `end` blocks of a tile, whose units need no mask and stand side by side.

    Returns how many were copied so far.
    """
    batch, head, list_, inner, _listed = place
    PIECE: gl.constexpr = UNIT if UNIT < COLS else COLS
    PIECES: gl.constexpr = COLS // PIECE
    HALVES: gl.constexpr = D // 64
    ids = tables[3] + list_ * sizes[5]
    if EVEN:
        ids += inner[1]
    for j in range(end):
        rows = ()
        for p in gl.static_range(PIECES):
            unit = gl.load(ids + j * COLS // UNIT + p)
            start = first_of_unit(unit, batch, tables, sizes, UNIT, EVEN)
            rows = rows + (start + j * COLS % UNIT,)  # noqa: RUF005
        stage = step % STAGES
        mbarrier.wait(free.index(stage), step // STAGES % 2 ^ 1)
        mbarrier.expect(ready.index(stage), COLS * D * 2)
        # A box for every unit and 64 columns of the head dim.
        for p in gl.static_range(PIECES):
            for h in gl.static_range(HALVES):
                tma.async_copy_global_to_shared(
                    Described, [batch, head, rows[p], h * 64], ready.index(stage),
                    pieces.index((stage * HALVES + h) * PIECES + p),
                )  # fmt: skip
        step += 1
    return step


@gluon.jit
def _copy_outer(
    first, end, step, place, Described, pieces, ready, free, tables, sizes, UNIT: gl.constexpr,
    COLS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Copies the blocks [first, end), one unit or part of one at a time: seldom run, so short."""
    num_keys, list_length = sizes[2], sizes[5]
    batch, head, list_, inner, count = place
    PIECE: gl.constexpr = UNIT if UNIT < COLS else COLS
    PIECES: gl.constexpr = COLS // PIECE
    HALVES: gl.constexpr = D // 64
    ids = tables[3] + list_ * list_length
    for piece in range(first * PIECES, end * PIECES):
        stage = step % STAGES
        p = piece % PIECES
        if p == 0:
            mbarrier.wait(free.index(stage), step // STAGES % 2 ^ 1)
            mbarrier.expect(ready.index(stage), COLS * D * 2)
        slot = piece * PIECE // UNIT
        listed = slot < count
        unit = gl.load(ids + place_of(slot, inner, list_length, EVEN), mask=listed, other=0)
        start = first_of_unit(unit, batch, tables, sizes, UNIT, EVEN)
        # What lies before the first key or behind the last arrives as zeros.
        row = gl.where(listed, start + piece * PIECE % UNIT, num_keys)
        for h in gl.static_range(HALVES):
            tma.async_copy_global_to_shared(
                Described, [batch, head, row, h * 64], ready.index(stage),
                pieces.index((stage * HALVES + h) * PIECES + p),
            )  # fmt: skip
        if p == PIECES - 1:
            step += 1
    return step


@gluon.jit
def rows_of_tile(
    Tiles, batch, sizes, t, row, GROUP: gl.constexpr, TOKENS: gl.constexpr,
    EVEN_TILES: gl.constexpr,
):  # fmt: skip
    """As `primitives.tile_rows`, for rows of any layout and tiles of which two may be short."""
    _items, num_queries, _num_keys, num_tiles, _units, _length, _kv_heads, _lead, lead = sizes
    if EVEN_TILES:
        token = t * TOKENS - lead + row // GROUP
        exists = (row // GROUP < TOKENS) & (token >= 0) & (token < num_queries)
    else:
        token = gl.load(Tiles + (batch * num_tiles + t) * 2) + row // GROUP
        exists = row // GROUP < gl.load(Tiles + (batch * num_tiles + t) * 2 + 1)
    return token.to(gl.int64), row % GROUP, exists


@gluon.jit
def listed_keys(
    column, tables, sizes, batch, list_, inner, count, UNIT: gl.constexpr, EVEN: gl.constexpr
):
    """Key token of columns of a list, and which exist."""
    _tiles, Units, _span, Order, _inner, _count = tables
    num_units, list_length, lead = sizes[4], sizes[5], sizes[7]
    slot = column // UNIT
    listed = slot < count
    place = place_of(slot, inner, list_length, EVEN)
    unit = gl.load(Order + list_ * list_length + place, mask=listed, other=0).to(gl.int32)
    if EVEN:
        return unit * UNIT - lead + column % UNIT, listed
    else:
        table = Units + (batch * num_units + unit) * 2
        start = gl.load(table, mask=listed, other=0)
        size = gl.load(table + 1, mask=listed, other=0)
        return start + column % UNIT, column % UNIT < size


@gluon.jit
def clean(
    block, j, w: gl.constexpr, layout: gl.constexpr, batch, list_, inner, count, tables, sizes,
    UNIT: gl.constexpr, COLS: gl.constexpr,
):  # fmt: skip
    """Zeros for a half of a block's rows that stand behind a short unit, or behind the list.

    Their box holds those of the next unit, and 0 x NaN is NaN.
    """
    HALF: gl.constexpr = COLS // 2
    column = j * COLS + w * HALF + gl.arange(0, HALF, gl.SliceLayout(1, layout))
    _key, there = listed_keys(column, tables, sizes, batch, list_, inner, count, UNIT, False)
    own = block.slice(w * HALF, HALF, dim=0)
    own.store(gl.where(there[:, None], own.load(layout), 0.0))


def sorted_lists(
    kv_heads: int, num_queries: int, tiles: Tensor, units: Tensor, span: Tensor, index: Tensor,
    count: Tensor, tile_tokens: int, unit: int, lead: int, tile_lead: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Lists as `place_of` reads them (B, K, T, L), what it must know of each (B, K, T, 2), and a
    number for the kernel behind: how many tiles were begun, none."""
    batch, _, num_tiles, list_length = index.shape
    num_units = units.shape[1]
    order, inner, begun = index, count.new_empty(*count.shape, 2), count.new_empty(1)
    if lead < 0:
        order = torch.empty_like(index, dtype=index_dtype(num_units))
    launch(
        sort_lists, (num_tiles, batch * kv_heads),
        order, inner, begun, tiles, units, span, index, count, num_queries, num_tiles, num_units,
        list_length, kv_heads, lead, TOKENS=tile_tokens, LENGTH=next_power_of_2(tile_tokens),
        UNIT=unit, WIDTH=min(next_power_of_2(list_length), 1024), EVEN=lead >= 0,
        REGULAR_TILES=all_whole(tile_lead, tile_tokens, num_queries),
    )  # fmt: skip
    return order, inner, begun


def boxes(x: Tensor, rows: int) -> TensorDescriptor:
    """Keys or values (B, K, M, D), to be copied so many rows and 64 columns at a time."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, 64], BOXED.value)

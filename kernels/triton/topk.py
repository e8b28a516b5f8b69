"""Keep the best units of every tile: a threshold by bisection, then ascending ids; no sort.

B batch, K KV heads, T tiles, U units, L list length, C units that compete for a tile
"""

# Triton launches are subscripts of a jit function, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_sparse.kernels.cached_launch import launch
from mm_sparse.kernels.sizes import index_dtype, next_power_of_2
from mm_sparse.kernels.triton.primitives import ROW_COUNTS, even_units

LOWEST = tl.constexpr(-2147483648)
HIGHEST = tl.constexpr(2147483647)
# Where a tile and a head start to count when they take every n-th unit, in 65536ths of a turn:
# multiples of the golden ratio and of its kin in three dimensions.
STEP_TILE, STEP_HEAD = tl.constexpr(40503), tl.constexpr(53813)
TURN = tl.constexpr(65536)
# Units of a row that registers hold; longer rows are read again in each step of the bisection.
IN_REGISTERS = 16384
CHUNK = 4096
RUN = tl.constexpr(16)
# Steps of the bisection after which it looks anew for the smallest unit that may still matter.
STEPS = tl.constexpr(8)
# More than a row has, of units that registers hold and of others.
MOST_TOKENS = tl.constexpr(1 << 30)
# Thresholds that are tried in one reading of a row that registers do not hold.
WAYS = tl.constexpr(8)


@triton.jit
def _ordered(value):
    """int32 that rise as the float32 do; NaN counts as the lowest number, not as the highest."""
    value = tl.where(value == value, value, -3.4028234663852886e38)
    # -0.0 and 0.0 are one score.
    value = tl.where(value == 0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _candidates(
    Values, Runs, run_count, Sinks, Units, slot, row_length, num_units, num_keys, lead, low, high,
    near_low, near_high, UNIT: tl.constexpr, EVEN: tl.constexpr, COARSE: tl.constexpr,
):  # fmt: skip
    """Unit, order of scores, size, which are seen, and which are kept whatever they score.

    Slots are units; or with COARSE, those of listed runs of so many units.
    """
    if COARSE > 1:
        run = tl.load(Runs + slot // COARSE, mask=slot < run_count * COARSE, other=0)
        unit = run.to(tl.int32) * COARSE + slot % COARSE
        there = (slot < run_count * COARSE) & (unit < num_units)
    else:
        unit = slot
        there = unit < num_units
    if EVEN:
        start, size = even_units(unit, lead, num_keys, UNIT)
        size = tl.where(there, size, 0)
    else:
        start = tl.load(Units + unit * 2, mask=there, other=0)
        size = tl.load(Units + unit * 2 + 1, mask=there, other=0)
    seen = (size > 0) & (start < high) & (start + size > low)
    near = (start < near_high) & (start + size > near_low)
    always = near | tl.load(Sinks + unit, mask=there, other=0).to(tl.int1)
    # What lies behind the units of a row may hold anything: it is not seen.
    order = _ordered(tl.load(Values + slot, mask=slot < row_length, other=0.0))
    return unit, order, size, seen, seen & always


@triton.jit
def _bounds(order, open_):
    """Extremes of the order of the open units."""
    lowest = tl.min(tl.where(open_, order, HIGHEST), 0)
    # Without an open one, nothing may equal the threshold.
    return lowest, tl.max(tl.where(open_, order, LOWEST + 1), 0)


@triton.jit
def _with_one(bounds, order, open_):
    """The same of one unit more."""
    lowest, highest = bounds
    return (
        tl.minimum(lowest, tl.where(open_, order, HIGHEST)),
        tl.maximum(highest, tl.where(open_, order, LOWEST + 1)),
    )


@triton.jit
def _tokens(order, size, bound):
    """Tokens of units of order `bound` or higher."""
    return tl.sum(tl.where(order >= bound, size, 0), 0)


@triton.jit
def _smallest(order, size, low, high):
    """Size of the smallest unit in a range of the order; large if there is none."""
    return tl.min(tl.where((order >= low) & (order <= high), size, MOST_TOKENS), 0)


@triton.jit
def _ends(need, smallest, TO_NEAREST: tl.constexpr):
    """Least and most tokens of the best units that are surely all to keep.

    Surely, if no unit next to the threshold is smaller than `smallest`.
    """
    if TO_NEAREST:
        return need - (smallest + 1) // 2 + 1, need + smallest // 2
    else:
        return need, need + smallest - 1


@triton.jit
def _middle(low, high):
    """Mean of two int32, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def _narrow(low, high, middle, tokens, need, least, most):
    """Next range of the threshold; empty once all from `middle` on are what is to be kept."""
    found = (tokens >= least) & (tokens <= most)
    enough = tokens >= need
    low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    return tl.where(found, middle - 1, low), tl.where(found, middle - 1, high)


@triton.jit
def _crossing(order, size, order_1, size_1, low, high, need, TO_NEAREST: tl.constexpr):
    """Largest threshold t in [low, high] such that what scores t or more has `need` tokens.

    Or one above which lies what is to be kept (`_ends`); or `low` if there are too few.
    """
    while low < high:
        # One short unit makes for many steps, as long as it may be next to the threshold.
        smallest = _smallest(order, size, low, high)
        inside = (order_1 >= low) & (order_1 <= high)
        smallest = tl.minimum(smallest, tl.where(inside, size_1, MOST_TOKENS))
        least, most = _ends(need, smallest, TO_NEAREST)
        step = 0
        while (low < high) & (step < STEPS):
            middle = _middle(low, high)
            tokens = _tokens(order, size, middle) + tl.where(order_1 >= middle, size_1, 0)
            low, high = _narrow(low, high, middle, tokens, need, least, most)
            step += 1
    return low


@triton.jit
def _fits(before, size, budget, TO_NEAREST: tl.constexpr):
    """To the nearest unit, or to the one that reaches the budget; at least one of the former."""
    if TO_NEAREST:
        return (before + (size + 1) // 2 <= budget) | (before == 0)
    else:
        return before < budget


@triton.jit
def _best(order, size, unit, order_1, size_1, cut, budget, TO_NEAREST: tl.constexpr):
    """All of higher order than `cut`, and of that order the lowest ids that fit the budget."""
    before = _tokens(order, size, cut + 1) + tl.where(order_1 > cut, size_1, 0)
    tied = order == cut
    run = tl.where(tied, size, 0)
    tokens = tl.sum(run, 0)
    if tl.sum(tied.to(tl.int32), 0) > 1:
        fits = _fits(before + tl.cumsum(run, 0) - run, size, budget, TO_NEAREST)
        stop = tl.min(tl.where(tied & ~fits, unit, HIGHEST), 0)
    else:
        stop = tl.where(_fits(before, tokens, budget, TO_NEAREST), HIGHEST, 0)
    # Its id is the highest: it comes behind all that tie.
    fits_1 = _fits(before + tokens, size_1, budget, TO_NEAREST)
    kept_1 = (order_1 > cut) | ((order_1 == cut) & fits_1)
    return (order > cut) | ((order == cut) & (unit < stop)), kept_1


@triton.jit
def _budget(Budget, batch, head, tile, num_tiles, budgets):
    """Tokens that a list may hold: its head's, or what all heads have."""
    row = batch * budgets + tl.minimum(head, budgets - 1)
    return tl.load(Budget + row * num_tiles + tile).to(tl.int32)


@triton.jit
def _list(kept, unit, kept_1, unit_1, Index, Count, list_length, FILL: tl.constexpr):
    """Write which of the ascending `unit` are kept, -1 behind them, and their number.

    Places are counted by runs, then in each run: that takes half the instructions of one sum.
    """
    RUNS: tl.constexpr = kept.shape[0] // RUN
    some = tl.reshape(kept.to(tl.int32), (RUNS, RUN))
    in_run = tl.sum(some, 1)
    place = tl.cumsum(some, 1) + (tl.cumsum(in_run, 0) - in_run)[:, None] - 1
    count = tl.sum(in_run, 0)
    tl.store(Index + place, tl.reshape(unit, (RUNS, RUN)), mask=(some > 0) & (place < list_length))
    tl.store(Index + count, unit_1, mask=kept_1 & (count < list_length))
    count += kept_1.to(tl.int32)
    slot = tl.arange(0, FILL)
    tl.store(Index + slot, -1, mask=(slot >= count) & (slot < list_length))
    tl.store(Count, tl.minimum(count, list_length))


@triton.jit
def _every_nth(others, size, other_1, size_1, tile, head, left, unit):
    """Of the units `others` so many as `left` tokens hold, evenly spaced, and the log of how many
    keys each key of them stands for; `mm_sparse.selection.sampling.draw` is the law."""
    have = tl.sum(others.to(tl.int32), 0) + other_1.to(tl.int32)
    keys = tl.sum(tl.where(others, size, 0), 0) + tl.where(other_1, size_1, 0)
    take = tl.minimum(tl.maximum((left + unit // 2) // unit, 0), have)
    take = tl.where(left < keys, take, have)
    start = ((tile * STEP_TILE + head * STEP_HEAD) % TURN * have // TURN).to(tl.int32)
    rank = tl.cumsum(others.to(tl.int32), 0) + start
    per = tl.maximum(have, 1)
    chosen = others & (rank * take // per > (rank - 1) * take // per)
    last = start + have
    chosen_1 = other_1 & (last * take // per > (last - 1) * take // per)
    taken = tl.sum(tl.where(chosen, size, 0), 0) + tl.where(chosen_1, size_1, 0)
    share = keys.to(tl.float32) / tl.maximum(taken, 1).to(tl.float32)
    return chosen, chosen_1, tl.log(tl.maximum(share, 1.0))


@triton.jit(do_not_specialize=ROW_COUNTS)
def _topk_registers(
    Values, Near, Sinks, Hull, Units, UnitKind, Runs, RunCount, Budget, Floor, Index, Count,
    WholeBudget, SampledLists, DrawnCount, All, AllCount, Weight, drawn_length, all_length,
    num_tiles, num_units, num_keys, lead, list_length, kv_heads, budgets, row_length, run_length,
    KINDS: tl.constexpr, SAMPLED: tl.constexpr, COARSE: tl.constexpr,
    BLOCK_U: tl.constexpr, FILL: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One list, and where SAMPLED a sample of the rest; the row of scores stays in registers.

    All units but one that may lie behind the block, which is looked at apart: a class token makes
    one more of many a power of two.
    """
    tile = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    batch = group // kv_heads
    own, list_ = batch * num_tiles + tile, group * num_tiles + tile
    Values += list_ * row_length
    Runs += list_ * run_length
    Sinks += batch * num_units
    Units += batch * num_units * 2
    run_count = tl.load(RunCount + list_) if COARSE > 1 else 0
    low, high = tl.load(Hull + own * 2), tl.load(Hull + own * 2 + 1)
    near_low, near_high = tl.load(Near + own * 2), tl.load(Near + own * 2 + 1)
    unit, order, size, seen, first = _candidates(
        Values, Runs, run_count, Sinks, Units, tl.arange(0, BLOCK_U), row_length,
        num_units, num_keys, lead, low, high, near_low, near_high, UNIT, EVEN, COARSE,
    )  # fmt: skip
    unit_1, order_1, size_1, seen_1, first_1 = _candidates(
        Values, Runs, run_count, Sinks, Units, BLOCK_U, row_length,
        num_units, num_keys, lead, low, high, near_low, near_high, UNIT, EVEN, COARSE,
    )  # fmt: skip
    budget = _budget(Budget, batch, group - batch * kv_heads, tile, num_tiles, budgets)
    if KINDS > 0:
        # The best of each modality up to its floor, whatever of it is kept anyway included.
        UnitKind += batch * num_units
        kind = tl.load(UnitKind + unit, mask=unit < num_units, other=-1).to(tl.int32)
        kind_1 = tl.load(UnitKind + unit_1, mask=unit_1 < num_units, other=-1).to(tl.int32)
        for k in range(KINDS):
            exact = budget.to(tl.float32) * tl.load(Floor + k)
            floor = exact.to(tl.int32)
            floor += (floor.to(tl.float32) < exact).to(tl.int32)
            of_kind, of_kind_1 = seen & (kind == k), seen_1 & (kind_1 == k)
            lowest, highest = _with_one(_bounds(order, of_kind), order_1, of_kind_1)
            ranked = tl.where(of_kind, order, LOWEST)
            ranked_1 = tl.where(of_kind_1, order_1, LOWEST)
            low = tl.where(floor > 0, lowest - 1, highest)
            cut = _crossing(ranked, size, ranked_1, size_1, low, highest, floor, False)
            best, best_1 = _best(ranked, size, unit, ranked_1, size_1, cut, floor, False)
            first, first_1 = first | best, first_1 | best_1
    taken = tl.sum(tl.where(first, size, 0), 0) + tl.where(first_1, size_1, 0)
    lowest, highest = _with_one(_bounds(order, seen & ~first), order_1, seen_1 & ~first_1)
    order = tl.where(first, HIGHEST, tl.where(seen, order, LOWEST))
    order_1 = tl.where(first_1, HIGHEST, tl.where(seen_1, order_1, LOWEST))
    low = tl.where(budget > taken, lowest - 1, highest)
    cut = _crossing(order, size, order_1, size_1, low, highest, budget, True)
    kept, kept_1 = _best(order, size, unit, order_1, size_1, cut, budget, True)
    Index += list_ * list_length
    _list(kept, unit, kept_1, unit_1, Index, Count + list_, list_length, FILL)
    if SAMPLED:
        head = group - batch * kv_heads
        whole = _budget(WholeBudget, batch, head, tile, num_tiles, budgets)
        left = whole - tl.sum(tl.where(kept, size, 0), 0) - tl.where(kept_1, size_1, 0)
        chosen, chosen_1, weight = _every_nth(
            seen & ~kept, size, seen_1 & ~kept_1, size_1, tile, head, left, UNIT
        )
        SampledLists += list_ * drawn_length
        _list(chosen, unit, chosen_1, unit_1, SampledLists, DrawnCount + list_, drawn_length, FILL)
        kept, kept_1 = chosen | kept, chosen_1 | kept_1
        _list(
            kept, unit, kept_1, unit_1, All + list_ * all_length, AllCount + list_, all_length, FILL
        )
        tl.store(Weight + list_, weight)


@triton.jit(do_not_specialize=ROW_COUNTS)
def _topk_chunked(
    Values, Near, Sinks, Hull, Units, Runs, RunCount, Budget, Index, Count,
    num_tiles, num_units, num_keys, lead, list_length, kv_heads, budgets, row_length, run_length,
    CHUNK: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, COARSE: tl.constexpr,
):  # fmt: skip
    """The same without floors, for a row of any length, CHUNK units at a time."""
    tile = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    batch = group // kv_heads
    own, list_ = batch * num_tiles + tile, group * num_tiles + tile
    Values += list_ * row_length
    Runs += list_ * run_length
    Sinks += batch * num_units
    Units += batch * num_units * 2
    low, high = tl.load(Hull + own * 2), tl.load(Hull + own * 2 + 1)
    near_low, near_high = tl.load(Near + own * 2), tl.load(Near + own * 2 + 1)
    run_count, row = 0, num_units
    if COARSE > 1:
        run_count = tl.load(RunCount + list_)
        row = run_count * COARSE
    budget = _budget(Budget, batch, group - batch * kv_heads, tile, num_tiles, budgets)
    lowest, highest, taken = HIGHEST, LOWEST + 1, 0
    for at in range(0, row, CHUNK):
        _unit, order, size, seen, first = _candidates(
            Values, Runs, run_count, Sinks, Units, at + tl.arange(0, CHUNK), row_length, num_units,
            num_keys, lead, low, high, near_low, near_high, UNIT, EVEN, COARSE,
        )  # fmt: skip
        some = _bounds(order, seen & ~first)
        lowest, highest = tl.minimum(lowest, some[0]), tl.maximum(highest, some[1])
        taken += tl.sum(tl.where(first, size, 0), 0)
    cut = tl.where(budget > taken, lowest - 1, highest)
    # The row is read for every step: many thresholds at once make it few steps.
    way = tl.arange(1, WAYS + 1)
    while cut < highest:
        width = highest.to(tl.int64) - cut
        bounds = (cut + (width * way + WAYS - 1) // WAYS).to(tl.int32)
        tokens = tl.zeros([WAYS], tl.int32)
        smallest = MOST_TOKENS
        for at in range(0, row, CHUNK):
            _unit, order, size, seen, first = _candidates(
                Values, Runs, run_count, Sinks, Units, at + tl.arange(0, CHUNK), row_length,
                num_units, num_keys, lead, low, high, near_low, near_high, UNIT, EVEN, COARSE,
            )  # fmt: skip
            order = tl.where(first, HIGHEST, tl.where(seen, order, LOWEST))
            tokens += tl.sum(tl.where(order[:, None] >= bounds[None, :], size[:, None], 0), 0)
            smallest = tl.minimum(smallest, _smallest(order, size, cut, highest))
        least, most = _ends(budget, smallest, True)
        enough = tokens >= budget
        found = tl.max(tl.where((tokens >= least) & (tokens <= most), bounds - 1, LOWEST), 0)
        some = found > LOWEST
        above = tl.max(tl.where(enough, bounds, cut), 0)
        below = tl.min(tl.where(enough, highest, bounds - 1), 0)
        cut, highest = tl.where(some, found, above), tl.where(some, found, below)
    before = 0
    for at in range(0, row, CHUNK):
        _unit, order, size, seen, first = _candidates(
            Values, Runs, run_count, Sinks, Units, at + tl.arange(0, CHUNK), row_length, num_units,
            num_keys, lead, low, high, near_low, near_high, UNIT, EVEN, COARSE,
        )  # fmt: skip
        order = tl.where(first, HIGHEST, tl.where(seen, order, LOWEST))
        before += _tokens(order, size, cut + 1)
    count = 0
    Index += list_ * list_length
    for at in range(0, row, CHUNK):
        unit, order, size, seen, first = _candidates(
            Values, Runs, run_count, Sinks, Units, at + tl.arange(0, CHUNK), row_length, num_units,
            num_keys, lead, low, high, near_low, near_high, UNIT, EVEN, COARSE,
        )  # fmt: skip
        order = tl.where(first, HIGHEST, tl.where(seen, order, LOWEST))
        run = tl.where(order == cut, size, 0)
        fits = _fits(before + tl.cumsum(run, 0) - run, size, budget, True)
        kept = (order > cut) | ((order == cut) & fits)
        rank = count + tl.cumsum(kept.to(tl.int32), 0)
        tl.store(Index + rank - 1, unit, mask=kept & (rank <= list_length))
        before += tl.sum(run, 0)
        count += tl.sum(kept.to(tl.int32), 0)
    for at in range(0, list_length, CHUNK):
        slot = at + tl.arange(0, CHUNK)
        tl.store(Index + slot, -1, mask=(slot >= count) & (slot < list_length))
    tl.store(Count + list_, tl.minimum(count, list_length))


@dataclass(frozen=True)
class SamplingBudget:
    """What `topk_blocks` shall draw of the units that it does not keep."""

    budget: Tensor
    """(B, K or 1, T) int64, tokens that the best and the sample may be together."""
    width: int
    """Length of a list of the sample."""
    whole: int
    """Length of a list of both."""


@dataclass(frozen=True)
class SampledLists:
    """What it drew: lists of the sample, of both, and logs of keys that a key stands for."""

    index: Tensor
    count: Tensor
    all_index: Tensor
    all_count: Tensor
    weight: Tensor
    """(B, K, T) float32."""


def topk_blocks(
    values: Tensor, near: Tensor, sinks: Tensor, hull: Tensor, units: Tensor, budget: Tensor,
    width: int, *, unit_kind: Tensor | None = None, floors: Tensor | None = None,
    unit: int, lead: int = -1, num_keys: int = 0, drawing: SamplingBudget | None = None,
    runs: tuple[Tensor, Tensor, int] | None = None,
) -> tuple[Tensor, Tensor, SampledLists | None]:  # fmt: skip
    """Lists of the kept units, as `mm_sparse.selection.selection` defines them; ties go to the
    lowest id.

    Args:
        values: (B, K, T, U) float32, or (B, K, T, C) of `runs`; with floors or `drawing` at most
            IN_REGISTERS + 1 of them.
        near: (B, T, 2) int32, range of keys whose units are kept whatever the scores, and
        sinks: (B, U) bool, units that are, if they are seen.
        hull: (B, T, 2) int32, range of keys that a tile sees.
        budget: (B, K, T) or (B, 1, T) int64, tokens that a tile may keep.
        width: L, which no list exceeds.
        unit_kind: (B, U) int8, and
        floors: (kinds,) float32, least share of the budget for units of each kind.
        unit: most keys of a unit.
        lead: if not -1, unit u is what exists of the `unit` keys from u * unit - lead on, of
            `num_keys` in all.
        drawing: what else to draw.
        runs: index and count of runs of units, ascending, and how many units a run has; of a list
            of R runs, C = R x that many units compete.
    Returns:
        index (B, K, T, L) int16 or int32, -1 behind the end, count (B, K, T) int32, what was drawn.
    """
    batch, heads, num_tiles, row = values.shape
    kind = index_dtype(units.shape[1])
    index = torch.empty(batch, heads, num_tiles, width, dtype=kind, device=values.device)
    count = torch.empty(batch, heads, num_tiles, dtype=torch.int32, device=values.device)
    grid = (num_tiles, batch * heads)
    values, apart = rows_of(values)
    inputs = (values, near, sinks, hull, units)
    if budget.shape not in ((batch, heads, num_tiles), (batch, 1, num_tiles)):
        raise ValueError(
            f"budget must be ({batch}, {heads} or 1, {num_tiles}), got {tuple(budget.shape)}"
        )
    listed, number, coarse = (units, units, 1) if runs is None else runs
    places = (num_tiles, units.shape[1], num_keys, lead)
    budget = budget.contiguous()
    counts = (*places, width, heads, budget.shape[1], apart, listed.shape[-1])
    even = {"UNIT": unit, "EVEN": lead >= 0, "COARSE": coarse}
    lists = [width] if drawing is None else [width, drawing.width, drawing.whole]
    block = next_power_of_2(max(row - 1, RUN.value))
    if block > IN_REGISTERS:
        if floors is not None or drawing is not None:
            what = "floors" if drawing is None else "a sample"
            raise ValueError(f"units must be at most {IN_REGISTERS + 1} with {what}, got {row}")
        launch(
            _topk_chunked, grid, *inputs, listed, number, budget, index, count, *counts,
            CHUNK=CHUNK, **even, num_warps=8,
        )  # fmt: skip
        return index, count, None
    drawn, sample = None, (budget, index, count, index, count, values, 0, 0)
    if drawing is not None:
        tables = [index.new_empty(*count.shape, length) for length in lists[1:]]
        tables = [x for table in tables for x in (table, torch.empty_like(count))]
        drawn = SampledLists(*tables, torch.empty_like(count, dtype=torch.float32))
        sample = (drawing.budget, *tables, drawn.weight, *lists[1:])
    launch(
        _topk_registers, grid, *inputs, units if unit_kind is None else unit_kind, listed, number,
        budget,
        values if floors is None else floors, index, count, *sample, *counts,
        KINDS=0 if floors is None else len(floors), SAMPLED=drawing is not None,
        BLOCK_U=block, FILL=next_power_of_2(max(lists)), **even,
        num_warps=keep_warps(block),
    )  # fmt: skip
    return index, count, drawn


def rows_of(values: Tensor) -> tuple[Tensor, int]:
    """Scores whose rows follow one another, and how far apart; what lies between can be read."""
    batch, heads, tiles, row = values.shape
    apart = values.stride(2)
    end = values.storage_offset() + batch * heads * tiles * apart
    even = values.stride() == (heads * tiles * apart, tiles * apart, apart, 1) and apart >= row
    if even and end * values.element_size() <= values.untyped_storage().nbytes():
        return values, apart
    return values.contiguous(), row


@lru_cache(maxsize=4096)
def keep_warps(block: int) -> int:
    """Warps for a row of `block` units, 16 in a thread where they can be: few sums across warps."""
    return max(1, min(block // 512, 16))

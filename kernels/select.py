"""Keep the best units of every tile: a threshold by bisection, then ascending ids; no sort.

B batch, K KV heads, T tiles, U units, L list length
"""

# Triton launches are subscripts of a jit function, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-2147483648)


@triton.jit
def _ordered(value):
    """int32 that rise as the float32 do; NaN counts as the lowest number, not as the highest."""
    value = tl.where(value == value, value, -3.4028234663852886e38)
    # -0.0 and 0.0 are one score.
    value = tl.where(value == 0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _crossing(order, size, open_, budget):
    """Largest threshold t such that what scores t or higher has at least `budget` tokens."""
    low = tl.full([], LOWEST, tl.int64)
    high = tl.full([], 2147483647, tl.int64)
    for _ in range(32):
        middle = (low + high + 1) >> 1
        enough = tl.sum(tl.where(open_ & (order.to(tl.int64) >= middle), size, 0), 0) >= budget
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _keep(
    Values, Always, Hull, Units, UnitKind, Budget, Floor, Index, Count,
    num_tiles, num_units, list_length, kv_heads,
    KINDS: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    batch = group // kv_heads
    unit = tl.arange(0, BLOCK_U)
    there = unit < num_units
    list_ = group * num_tiles + tile
    start = tl.load(Units + (batch * num_units + unit) * 2, mask=there, other=0)
    size = tl.load(Units + (batch * num_units + unit) * 2 + 1, mask=there, other=0)
    low = tl.load(Hull + (batch * num_tiles + tile) * 2)
    high = tl.load(Hull + (batch * num_tiles + tile) * 2 + 1)
    seen = (size > 0) & (start < high) & (start + size > low)
    always = tl.load(Always + (batch * num_tiles + tile) * num_units + unit, mask=there, other=0)
    first = seen & always.to(tl.int1)
    order = _ordered(tl.load(Values + list_ * num_units + unit, mask=there, other=0.0))
    budget = tl.load(Budget + batch * num_tiles + tile)
    if KINDS > 0:
        # The best of each modality up to its floor, whatever of it is kept anyway included.
        kind = tl.load(UnitKind + batch * num_units + unit, mask=there, other=-1).to(tl.int32)
        floors = first
        for k in range(KINDS):
            share = tl.load(Floor + k)
            own = seen & (kind == k)
            least = (budget.to(tl.float32) * share).to(tl.float32)
            cut = _crossing(order, size, own, least)
            above = own & (order.to(tl.int64) > cut)
            tied = own & (order.to(tl.int64) == cut)
            before = tl.sum(tl.where(above, size, 0), 0)
            before += tl.cumsum(tl.where(tied, size, 0), 0) - tl.where(tied, size, 0)
            inside = above | (tied & (before.to(tl.float32) < least))
            floors = floors | inside
        first = floors
    order = tl.where(first, 2147483647, order)
    cut = _crossing(order, size, seen, budget)
    above = seen & (order.to(tl.int64) > cut)
    tied = seen & (order.to(tl.int64) == cut)
    before = tl.sum(tl.where(above, size, 0), 0)
    before += tl.cumsum(tl.where(tied, size, 0), 0) - tl.where(tied, size, 0)
    # To the nearest unit; the best one is kept even if it is larger than the budget.
    kept = above | (tied & ((before + (size + 1) // 2 <= budget) | (before == 0))) | first
    rank = tl.cumsum(kept.to(tl.int32), 0)
    count = tl.sum(kept.to(tl.int32), 0)
    tl.store(Index + list_ * list_length + rank - 1, unit, mask=kept & (rank <= list_length))
    tl.store(Index + list_ * list_length + unit, -1, mask=(unit >= count) & (unit < list_length))
    tl.store(Count + list_, tl.minimum(count, list_length))


def keep_best(
    values: Tensor, always: Tensor, hull: Tensor, units: Tensor, budget: Tensor, width: int, *,
    unit_kind: Tensor | None = None, floors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Lists of the kept units, as `mm_sparse.selection` defines them; ties go to the lowest id.

    Args:
        values: (B, K, T, U) float32.
        always: (B, T, U) bool, kept whatever the scores.
        hull: (B, T, 2) int32, range of keys that a tile sees.
        budget: (B, T) int, tokens that a tile may keep.
        width: L, which no list exceeds.
        unit_kind: (B, U) int8, and
        floors: (kinds,) float32, least share of the budget for units of each kind.
    Returns:
        index (B, K, T, L) int32, -1 behind the end, and count (B, K, T) int32.
    """
    batch, heads, num_tiles, num_units = values.shape
    index = torch.empty(batch, heads, num_tiles, width, dtype=torch.int32, device=values.device)
    count = torch.empty(batch, heads, num_tiles, dtype=torch.int32, device=values.device)
    block = triton.next_power_of_2(max(num_units, width, 16))
    _keep[(num_tiles, batch * heads)](
        values.contiguous(), always, hull, units, units if unit_kind is None else unit_kind,
        budget, values if floors is None else floors, index, count,
        num_tiles, num_units, width, heads,
        KINDS=0 if floors is None else len(floors), BLOCK_U=block,
        num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
    )  # fmt: skip
    return index, count

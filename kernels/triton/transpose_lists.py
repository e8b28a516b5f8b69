"""`transpose.transpose_lists` on a GPU: count, running sum, scatter; O(kept units).

B batch, K KV heads, T tiles, U units, L list length, C chunks of tiles
"""

# Triton launches are subscripts of a jit function, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_sparse.kernels.sizes import next_power_of_2
from mm_sparse.kernels.triton.primitives import COUNTS

# Tiles that a program scatters one after the other, so that those of a unit stay ascending.
IN_TURN = 8


@triton.jit(do_not_specialize=COUNTS)
def _transpose_count(
    Slot, Counts, Tiles, Units, Span, Index, Count, num_queries, num_tiles, num_units, list_length,
    kv_heads, chunks, chunk, UNIT: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Slot of every place of a list: its unit, and whether the tile sees only a part of it."""
    t = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    batch = group // kv_heads
    start = tl.load(Tiles + (batch * num_tiles + t) * 2)
    length = tl.load(Tiles + (batch * num_tiles + t) * 2 + 1)
    offset = tl.arange(0, TOKENS)
    exists = offset < length
    span = Span + (batch * num_queries + start + offset) * 2
    all_from = tl.max(tl.load(span, mask=exists, other=0), 0)
    all_to = tl.min(tl.load(span + 1, mask=exists, other=2147483647), 0)
    row = group * num_tiles + t
    count = tl.load(Count + row)
    for first in range(0, count, WIDTH):
        place = first + tl.arange(0, WIDTH)
        listed = place < count
        unit = tl.load(Index + row * list_length + place, mask=listed, other=0).to(tl.int32)
        table = Units + (batch * num_units + unit) * 2
        low = tl.load(table, mask=listed, other=0)
        size = tl.load(table + 1, mask=listed, other=0)
        partial = (size < UNIT) | (low < all_from) | (low + size > all_to)
        slot = (group * num_units + unit) * 2 + partial.to(tl.int64)
        slot = slot * chunks + t // chunk
        tl.store(Slot + row * list_length + place, slot.to(Slot.dtype.element_ty), mask=listed)
        # Sums of integers: the order in which they come makes no difference.
        tl.atomic_add(Counts + slot, 1, mask=listed, sem="relaxed")


@triton.jit(do_not_specialize=COUNTS)
def _transpose_scatter(
    Slot, Counts, Edges, Tile, Count, num_tiles, list_length, chunk, WIDTH: tl.constexpr
):  # fmt: skip
    """Write the tiles of a chunk, ascending, to the lists of their units; uses `Counts` up."""
    group = tl.program_id(1).to(tl.int64)
    first_tile = tl.program_id(0) * chunk
    for t in range(first_tile, tl.minimum(first_tile + chunk, num_tiles)):
        row = group * num_tiles + t
        count = tl.load(Count + row)
        for first in range(0, count, WIDTH):
            place = first + tl.arange(0, WIDTH)
            listed = place < count
            slot = tl.load(Slot + row * list_length + place, mask=listed, other=0).to(tl.int64)
            left = tl.load(Counts + slot, mask=listed, other=0)
            tl.store(Counts + slot, left - 1, mask=listed)
            end = tl.load(Edges + slot + 1, mask=listed, other=0)
            tl.store(Tile + end - left, t, mask=listed)
        # What this tile took off a count, the next must see.
        tl.debug_barrier()


def transpose_lists(
    tiles: Tensor, units: Tensor, span: Tensor, index: Tensor, count: Tensor,
    tile_tokens: int, unit: int,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """As `transpose.transpose_lists`; offset i of the law is `edges[i * chunks]` here.

    Returns:
        tile ids (B * K * T * L,) int32, edges (B * K * U * 2 * C + 1,) int32, and C.
    """
    batch, heads, num_tiles, length = index.shape
    num_units, total, device = units.shape[1], index.numel(), index.device
    # As many counters as places at most: fewer chunks where a list is short beside the units.
    most = max(num_tiles * length // max(num_units, 1), 1)
    chunks = min(-(-num_tiles // IN_TURN), most)
    chunk = -(-num_tiles // chunks)
    slots = batch * heads * num_units * 2 * chunks
    counts = torch.zeros(slots + 1, dtype=torch.int32, device=device)
    slot = torch.empty(total, dtype=torch.int32 if slots < 2**31 else torch.int64, device=device)
    tile = torch.empty(total, dtype=torch.int32, device=device)
    width = min(next_power_of_2(length), 512)
    _transpose_count[(num_tiles, batch * heads)](
        slot, counts[1:], tiles, units, span, index, count, span.shape[1], num_tiles, num_units,
        length, heads, chunks, chunk, UNIT=unit, TOKENS=next_power_of_2(tile_tokens),
        WIDTH=width, num_warps=4,
    )  # fmt: skip
    edges = counts.cumsum(0, dtype=torch.int32)
    _transpose_scatter[(chunks, batch * heads)](
        slot, counts[1:], edges, tile, count, num_tiles, length, chunk, WIDTH=width, num_warps=4
    )
    return tile, edges, chunks

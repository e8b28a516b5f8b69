"""`transpose.transpose_lists` in two launches around a radix sort.

B batch, K KV heads, T tiles, U units, L list length
"""

# Triton launches are subscripts of a jit function, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _slots(
    Slot, Tiles, Units, Span, Index, Count, num_queries, num_tiles, num_units, list_length,
    kv_heads, behind, UNIT: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sort key of every place of a list: its unit, and whether the tile sees only a part of it."""
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
    for first in range(0, list_length, WIDTH):
        place = first + tl.arange(0, WIDTH)
        listed = place < count
        unit = tl.load(Index + row * list_length + place, mask=listed, other=0)
        table = Units + (batch * num_units + unit) * 2
        low = tl.load(table, mask=listed, other=0)
        size = tl.load(table + 1, mask=listed, other=0)
        partial = (size < UNIT) | (low < all_from) | (low + size > all_to)
        slot = (group * num_units + unit) * 2 + partial.to(tl.int64)
        slot = tl.where(listed, slot, behind).to(Slot.dtype.element_ty)
        tl.store(Slot + row * list_length + place, slot, mask=place < list_length)


@triton.jit
def _tiles(Order, Tile, total, list_length, num_tiles, WIDTH: tl.constexpr):
    """Tile of each sorted place."""
    place = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    order = tl.load(Order + place, mask=place < total, other=0)
    tl.store(Tile + place, (order // list_length % num_tiles).to(tl.int32), mask=place < total)


def transpose_lists(
    tiles: Tensor, units: Tensor, span: Tensor, index: Tensor, count: Tensor,
    tile_tokens: int, unit: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `transpose.transpose_lists`."""
    batch, heads, num_tiles, length = index.shape
    num_units, total = units.shape[1], index.numel()
    slots = batch * heads * num_units * 2
    wide = torch.int32 if slots < 2**31 - 1 else torch.int64
    slot = torch.empty(total, dtype=wide, device=index.device)
    _slots[(num_tiles, batch * heads)](
        slot, tiles, units, span, index, count, span.shape[1], num_tiles, num_units, length, heads,
        slots, UNIT=unit, TOKENS=triton.next_power_of_2(tile_tokens),
        WIDTH=min(triton.next_power_of_2(length), 512), num_warps=4,
    )  # fmt: skip
    slot, order = slot.sort(stable=True)
    tile = torch.empty(total, dtype=torch.int32, device=index.device)
    _tiles[(triton.cdiv(total, 1024),)](order, tile, total, length, num_tiles, WIDTH=1024)
    edges = torch.arange(slots + 1, device=index.device, dtype=wide)
    return tile, torch.searchsorted(slot, edges, out_int32=True)

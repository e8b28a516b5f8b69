"""Lists of units as places in memory, for kernels whose copies are addressed so.

B batch, K KV heads, T tiles, L list length
"""

# Triton launches are subscripts of a jit function, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_sparse.kernels.cached_launch import launch
from mm_sparse.kernels.paged.pages import Pages, page_arguments
from mm_sparse.kernels.sizes import next_power_of_2
from mm_sparse.kernels.triton.primitives import COUNTS, place_of_unit


@triton.jit(do_not_specialize=COUNTS)
def _placed_lists(
    Placed, Index, Count, PageTable, kv_heads, num_tiles, list_length, stride_pages,
    WIDTH: tl.constexpr, PAGE_UNITS: tl.constexpr, PAGE_STRIDE: tl.constexpr,
):  # fmt: skip
    list_ = tl.program_id(0).to(tl.int64)
    PageTable += list_ // (kv_heads * num_tiles) * stride_pages
    count = tl.load(Count + list_)
    for first in range(0, count, WIDTH):
        slot = first + tl.arange(0, WIDTH)
        listed = slot < count
        unit = tl.load(Index + list_ * list_length + slot, mask=listed, other=0).to(tl.int32)
        place = place_of_unit(PageTable, unit, PAGE_UNITS, PAGE_STRIDE)
        tl.store(Placed + list_ * list_length + slot, place, mask=listed)


def placed_lists(index: Tensor, count: Tensor, pages: Pages) -> Tensor:
    """(B, K, T, L) int32: where listed units stand in memory; nothing is written behind `count`.

    Args:
        index: (B, K, T, L) int16 or int32, numbers of units in their sequences.
        count: (B, K, T) int32.
    """
    placed = torch.empty_like(index, dtype=torch.int32)
    if placed.numel():
        length = index.shape[-1]
        table, stride, sizes = page_arguments(pages)
        launch(
            _placed_lists, (count.numel(),), placed, index, count, table,
            *count.shape[1:], length, stride,
            WIDTH=min(next_power_of_2(length), 1024), **sizes, num_warps=4,
        )  # fmt: skip
    return placed

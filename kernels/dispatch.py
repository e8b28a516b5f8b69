"""Which of the kernels serves a call.

B batch, H query heads, K KV heads, N query tokens, D head dim, T tiles, L list length
"""

import triton
from torch import Tensor

from mm_sparse.kernels.block_lists import BlockLists
from mm_sparse.kernels.device import generation, multiprocessors
from mm_sparse.kernels.paged.pages import Pages
from mm_sparse.kernels.sizes import next_power_of_2
from mm_sparse.kernels.triton import attention_backward, attention_decode, attention_forward
from mm_sparse.kernels.triton.primitives import describable

# Keys of a unit from which on a head of 128 that shares its keys with no other is faster with its
# scores computed twice than with sums of gradients in memory.
WIDE_UNIT = 64


def on_hopper(q: Tensor, k: Tensor, v: Tensor, rows: int) -> bool:
    """Whether kernels for Hopper serve: 16-bit numbers, head dims 64 and 128, full tiles.

    Gluon's names change from release to release: it is written for those of Triton 3.6.
    """
    return (
        q.is_cuda
        and generation(q) == 9
        and triton.__version__.startswith("3.6.")
        and q.shape[-1] in (64, 128)
        and rows == 128
        and q.element_size() == 2
        and describable(k)
        and describable(v)
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, pages: Pages | None = None
) -> tuple[Tensor, Tensor]:
    """The fastest forward kernel on lists of units: out (B, H, N, D), log-sum-exp (B, H, N).

    With `pages`, k and v are all pages in memory as one row, of `paged.pages.flat_tokens`.
    """
    batch, kv_heads, num_tiles, list_length = lists.index.shape
    rows = _rows(q, k, lists.tile_tokens)
    if rows <= attention_decode.MOST_ROWS:
        count = num_tiles * batch * kv_heads
        splits = attention_decode.splits_of_lists(
            count, list_length * lists.unit, multiprocessors(q)
        )
        if splits > 1:
            return attention_decode.block_sparse_attention_split_kv(
                q, k, v, lists, scale, splits, pages
            )
    copied = pages is None or (batch == 1 and lists.unit_offset == 0)
    if copied and on_hopper(q, k, v, rows):
        # Imported here: other releases of Triton may lack what it needs.
        from mm_sparse.kernels.hopper import forward as hopper

        return hopper.block_sparse_attention_fwd_hopper(q, k, v, lists, scale, pages)
    return attention_forward.block_sparse_attention_fwd(q, k, v, lists, scale, pages)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: BlockLists,
    scale: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The fastest backward kernels: dq, dk, dv."""
    alone = q.shape[1] == k.shape[1] and q.shape[-1] == 128
    twice = deterministic or (alone and lists.unit >= WIDE_UNIT)
    if not twice and on_hopper(q, k, v, _rows(q, k, lists.tile_tokens)):
        from mm_sparse.kernels.hopper import backward as hopper

        return hopper.block_sparse_attention_bwd_hopper(dout, q, k, v, out, lse, lists, scale)
    return attention_backward.block_sparse_attention_bwd(dout, q, k, v, out, lse, lists, scale)


def _rows(q: Tensor, k: Tensor, tile_tokens: int) -> int:
    """Rows of a tile: its tokens times the query heads that share keys."""
    return next_power_of_2(min(tile_tokens, q.shape[2]) * (q.shape[1] // k.shape[1]))

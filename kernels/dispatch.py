"""Which of the kernels serves a call.

B batch, H query heads, K KV heads, N query tokens, D head dim, T tiles, L list length
"""

import triton
from torch import Tensor

from mm_sparse.kernels.device import generation, multiprocessors
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


def attend_forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, units: Tensor, span: Tensor, index: Tensor,
    count: Tensor, scale: float, tile_tokens: int, unit: int, lead: int, tile_lead: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `forward.attend_forward`, by the fastest kernel: out (B, H, N, D), lse (B, H, N)."""
    args = (
        q, k, v, tiles, units, span, index, count, scale, tile_tokens, unit, lead, tile_lead
    )  # fmt: skip
    batch, kv_heads, num_tiles, list_length = index.shape
    rows = _rows(q, k, tile_tokens)
    lists = num_tiles * batch * kv_heads
    parts = attention_decode.parts_of_lists(lists, list_length * unit, multiprocessors(q))
    if parts > 1 and rows <= attention_decode.MOST_ROWS:
        return attention_decode.attend_forward(*args, parts)
    if on_hopper(q, k, v, rows):
        # Imported here: other releases of Triton may lack what it needs.
        from mm_sparse.kernels.hopper import forward

        return forward.attend_forward(*args)
    return attention_forward.attend_forward(*args)


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor,
    units: Tensor, span: Tensor, index: Tensor, count: Tensor, scale: float, tile_tokens: int,
    unit: int, lead: int, tile_lead: int, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `backward.attend_backward`, by the fastest kernels: dq, dk, dv."""
    args = (
        dout, q, k, v, out, lse, tiles, units, span, index, count, scale, tile_tokens, unit, lead,
        tile_lead,
    )  # fmt: skip
    alone = q.shape[1] == k.shape[1] and q.shape[-1] == 128
    twice = deterministic or (alone and unit >= WIDE_UNIT)
    if not twice and on_hopper(q, k, v, _rows(q, k, tile_tokens)):
        from mm_sparse.kernels.hopper import backward

        return backward.attend_backward(*args)
    return attention_backward.attend_backward(*args)


def _rows(q: Tensor, k: Tensor, tile_tokens: int) -> int:
    """Rows of a tile: its tokens times the query heads that share keys."""
    return next_power_of_2(min(tile_tokens, q.shape[2]) * (q.shape[1] // k.shape[1]))

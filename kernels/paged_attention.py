"""Attention on lists of units over keys and values in pages.

B batch, H query heads, K KV heads, N query tokens, D head dim, A pages in memory, S tokens of a
page, T tiles, L list length
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm_sparse.kernels import cpu
from mm_sparse.kernels.block_lists import BlockLists
from mm_sparse.kernels.device import runs_triton
from mm_sparse.kernels.paged.pages import Pages, flat_tokens, gather_tokens, page_layout
from mm_sparse.kernels.reference import attend_reference


def pages_of(pool: Tensor, table: Tensor, unit: int) -> Pages:
    """The pages of sequences, from the keys (A, K, S, D) and the table (B, P) of an engine.

    Raises:
        ValueError: as `page_layout`.
        TypeError: the table is not int32.
    """
    if table.dtype != torch.int32 or table.dim() != 2:
        raise TypeError(
            f"table must be (sequences, pages) int32, got {tuple(table.shape)} {table.dtype}"
        )
    return Pages(table, *page_layout(pool, unit))


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lists: BlockLists, scale: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Exact softmax attention of every tile on the units in its list, of keys in pages.

    Everything in `lists` counts in tokens and units of the sequence: unit u is its keys from
    u * unit on, and a query sees those of its span alone. Nothing waits for the device, and shapes
    do not depend on lengths, so that calls can be recorded in a CUDA graph.

    What pages hold behind the end of a sequence must be finite, as numbers of a sequence that had
    them before are: Hopper's copies take whole units, and 0 x NaN is NaN.

    Args:
        q: (B, H, N, D).
        k, v: (A, K, S, D), any strides whose pages lie whole units apart; S a multiple of the unit.
        table: (B, P) int32, page of each run of S tokens.
        lists: units that each tile attends to.
        scale: factor on the scores.
        backend: "auto", or "torch" to copy keys out of their pages.
    Returns:
        out (B, H, N, D), log-sum-exp (B, H, N) float32.
    Raises:
        ValueError: pages that do not hold whole units, or shapes that do not fit.
        TypeError: the table is not int32, or dtypes differ.
    """
    pages = pages_of(k, table, lists.unit)
    _check_fit(q, k, v, table)
    if page_layout(v, lists.unit) != pages[1:]:
        raise ValueError(f"v must lie as k does, got strides {v.stride()} and {k.stride()}")
    if not runs_triton(q, backend):
        keys, values = (gather_tokens(x, table, lists.units.shape[1] * lists.unit) for x in (k, v))
        with torch.autocast(q.device.type, enabled=False):
            return cpu.gathered_attention_fwd(q, keys, values, lists, scale)
    from mm_sparse.kernels import dispatch

    return dispatch.forward(q, flat_tokens(k), flat_tokens(v), lists, scale, pages)


def _check_fit(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> None:
    """Refuse what a kernel would read beyond."""
    if q.dim() != 4:
        raise ValueError(f"q must be (sequences, heads, tokens, D), got {tuple(q.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q must have k's head dim {k.shape[3]}, got {q.shape[3]}")
    if q.shape[1] % max(k.shape[1], 1):
        raise ValueError(f"q must have a multiple of k's {k.shape[1]} heads, got {q.shape[1]}")
    if len(table) != len(q):
        raise ValueError(f"table must have a row for each of q's {len(q)}, got {len(table)}")


def paged_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lists: BlockLists, scale: float
) -> Tensor:
    """The same in plain PyTorch: keys are copied in their order, then `attend_reference`."""
    keys, values = (gather_tokens(x, table, lists.units.shape[1] * lists.unit) for x in (k, v))
    geometry = (lists.tiles, lists.units, lists.span, lists.index, lists.count)
    return attend_reference(q, keys, values, *geometry, scale)

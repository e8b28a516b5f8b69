"""Exact attention on a selection.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim
"""

from __future__ import annotations

import math

from torch import Tensor

from mm_sparse._backend import last_contiguous
from mm_sparse._checks import autocast_inputs, check_qkv
from mm_sparse.attention.sampled import attend_sampled
from mm_sparse.kernels import ops
from mm_sparse.kernels.ops import supports
from mm_sparse.selection import Selection


def attend(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, *, scale: float | None = None
) -> Tensor:
    """Softmax attention under `selection.to_dense_mask()`, without ever building it.

    Where the selection has a sample (`SparseConfig.sample_ratio`), its keys count several times.
    Differentiable in q, k and v. Sums run in a fixed order, so results repeat bit for bit;
    gradients of k and v need not where `SparseConfig.deterministic` lets them.
    Under autocast the inputs are cast to its dtype.

    Args:
        q: (B, H, N, D), float16, bfloat16 or float32, on a CPU also float64.
        k, v: (B, K, M, D).
        scale: factor on q.k, 1 / sqrt(D) if None.
    Returns:
        (B, H, N, D); a query that sees no kept key gets zeros and passes no gradient.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; the message names which.
    """
    q, k, v = autocast_inputs(q, k, v)
    check_qkv(q, k, v)
    if not isinstance(selection, Selection):
        raise TypeError(f"selection must be a Selection, got {type(selection).__name__}")
    plan = selection.plan
    want = (plan.tiles.shape[0], selection.num_query_heads, plan.num_queries)
    if q.shape[:3] != want:
        raise ValueError(
            f"q must be (batch, heads, tokens, head dim) with {want} as the selection has, "
            f"got {tuple(q.shape)}"
        )
    if k.shape[2] != plan.layout.length or k.shape[1] != selection.index.shape[1]:
        raise ValueError(
            f"k must have {selection.index.shape[1]} heads and {plan.layout.length} tokens as the "
            f"selection has, got {tuple(k.shape)}"
        )
    if selection.index.device != q.device:
        raise ValueError(f"selection must be on {q.device} as q is, got {selection.index.device}")
    reason = supports(q, k, plan.unit, plan.config.backend)
    if reason is not None:
        raise ValueError(f"q cannot be served by the sparse kernels: {reason}")
    return attend_selection(q, k, v, selection, scale)


def attend_selection(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float | None = None
) -> Tensor:
    """`attend` for inputs that were checked."""
    plan, config = selection.plan, selection.plan.config
    if q.numel() == 0 or k.numel() == 0:
        # Zeros whatever q holds, with a graph to q and v.
        return q.new_zeros(q.shape) + 0 * (q[..., :0].sum() + v[..., :0].sum())
    q, k, v = last_contiguous(q), last_contiguous(k), last_contiguous(v)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if selection.sample is not None:
        return attend_sampled(q, k, v, selection.sample, plan, scale)
    lists = plan.block_lists(selection.index, selection.count)
    return ops.attend(q, k, v, lists, scale, config.backend, plan.deterministic)[0]

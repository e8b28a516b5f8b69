"""Exact attention on a selection, and the three steps in one call.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim
"""

from __future__ import annotations

import math

from torch import Tensor

from mm_sparse._checks import autocast_inputs, check_heads
from mm_sparse.attention.dense import dense_attention, dense_length
from mm_sparse.attention.pipeline import score_select_attend
from mm_sparse.attention.selected import attend
from mm_sparse.config import SparseConfig
from mm_sparse.kernels.ops import supports
from mm_sparse.kernels.reference import attention_reference
from mm_sparse.layout import CallLayout, TokenLayout, in_patch_order, restore
from mm_sparse.scorers import DescriptorCache, PooledScorer, Scorer

__all__ = ["attend", "attention_reference", "sparse_attention"]

_POOLED = PooledScorer()


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: TokenLayout,
    config: SparseConfig,
    scorer: Scorer | None = None,
    query_offset: int | None = None,
    scale: float | None = None,
    descriptors: DescriptorCache | None = None,
) -> Tensor:
    """Score, select, attend; dense below `config.dense_below` tokens or with backend "dense".

    Images with a grid are ranked in patch order (`SparseConfig.patch_order`): the scorer is given
    tokens and layout in that order. What comes in and goes out is in the order of `layout`.

    Args:
        q: (B, H, N, D), the last N tokens of the layout unless `query_offset` says otherwise.
        k, v: (B, K, M, D), one key per token of the layout.
        scorer: `PooledScorer()` if None.
        descriptors: of the keys that earlier calls for this layer and sequence had, for decoding.
    Returns:
        (B, H, N, D); a query that sees no kept key gets zeros.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit each other, the layout or
            the backend; the message names the argument.

    Example:
        >>> q, k, v = torch.randn(3, 1, 8, 4096, 64).unbind()
        >>> layout = mms.TokenLayout.text(1, 4096)
        >>> config = mms.SparseConfig(ratio=0.2, dense_below=0)
        >>> out = mms.sparse_attention(q, k, v, layout=layout, config=config)
    """
    q, k, v = autocast_inputs(q, k, v)
    check_heads(q, k, v, layout)
    if not isinstance(config, SparseConfig):
        raise TypeError(f"config must be a SparseConfig, got {type(config).__name__}")
    if layout.length < dense_length(config, q.device) or config.backend == "dense":
        return dense_attention(
            q, k, v, layout=layout, config=config, query_offset=query_offset, scale=scale
        )
    reason = supports(q, k, config.unit, config.backend)
    if reason is not None:
        raise ValueError(f"q cannot be served by the sparse kernels: {reason}")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    first = layout.first_query(q.shape[2], query_offset)
    call, q, k, v = in_patch_order(CallLayout(layout, first), config, q, k, v)
    scorer = _POOLED if scorer is None else scorer
    out = score_select_attend(q, k, v, call, config, scorer, scale, cache=descriptors)
    return out if call.layout is layout else restore(out, call.layout, first)

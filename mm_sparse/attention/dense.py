"""Dense attention for what is too short to gain from a selection.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mm_sparse.config import SparseConfig
from mm_sparse.layout import TokenLayout

# Tokens below which dense SDPA was faster than score + select + attend, by kind of a call
# (docs/results/speed.md, docs/results/models.md).
BREAK_EVEN = {
    "call": {"cpu": 3072, "cuda": 8192},
    # One query that goes on in place where the step before ended.
    "step": {"cpu": 3072, "cuda": 32768},
    # One query with a layout and a plan of its own.
    "planned step": {"cpu": 3072, "cuda": 262144},
}


def dense_length(config: SparseConfig, device: torch.device, kind: str = "call") -> int:
    """Number of tokens below which a layer runs dense.

    Args:
        kind: of `BREAK_EVEN`.
    """
    if config.dense_below is not None:
        return config.dense_below
    # No kernel was written for other devices: dense, unless the config says a length.
    return BREAK_EVEN[kind].get(device.type, sys.maxsize)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: TokenLayout,
    config: SparseConfig,
    query_offset: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention on all visible keys through torch's SDPA; a query that sees nothing gets zeros."""
    num_queries = q.shape[2]
    offset = layout.first_query(num_queries, query_offset)
    span = layout.visible_span(config.causal, config.bidirectional)
    group = q.shape[1] // k.shape[1]
    span = span[:, offset : offset + num_queries]
    position = torch.arange(layout.length, device=q.device)
    end = position[offset : offset + num_queries] + 1
    options: dict[str, Any] = {"scale": scale, "enable_gqa": group > 1}
    whole = bool(layout.valid.all() & (span[..., 0] == 0).all())
    if whole and bool((span[..., 1] == layout.length).all()):
        return scaled_dot_product_attention(q, k, v, **options)
    if whole and num_queries == layout.length and bool((span[..., 1] == end).all()):
        return scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    seen = (position >= span[..., :1]) & (position < span[..., 1:]) & layout.valid[:, None]
    out = scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], **options)
    return out.masked_fill(~seen.any(-1)[:, None, :, None], 0)

"""Attention of one layer of an engine: sparse where it can be, else FlashAttention's.

N tokens of a step, H query heads, K KV heads, A pages in memory, S tokens of a page, D head dim
"""

# vLLM is no dependency of this package.
# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from mm_sparse.attention import PagedStep

DTYPES = ("auto", "float16", "bfloat16")


class SparseAttention(FlashAttentionImpl):
    """FlashAttention's implementation, which serves what stays dense, and the sparse one."""

    stays_dense: str | None
    """Why the layer never runs sparse; None if it may."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int,
        alibi_slopes: list[float] | None = None, sliding_window: int | None = None,
        kv_cache_dtype: str = "auto", logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER, kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None, **extra: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window,
            kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name, sinks,
            **extra,
        )  # fmt: skip
        reasons = {
            "sliding window": sliding_window is not None,
            "soft cap": bool(logits_soft_cap),
            "learned sinks": sinks is not None,
            "ALiBi": alibi_slopes is not None,
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            "keys of another layer": kv_sharing_target_layer_name is not None,
            f"keys of type {kv_cache_dtype}": kv_cache_dtype not in DTYPES,
        }
        self.stays_dense = next((reason for reason, true in reasons.items() if true), None)

    def forward(
        self, layer: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        attn_metadata: Any, output: Tensor, output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of a step.

        Args:
            layer: whose name says which it is.
            query: (N, H, D), behind rotary positions.
            key, value: (N, K, D), which the engine has written to the cache before.
            kv_cache: (A, K, S, 2 D), keys beside values.
            attn_metadata: of `SparseMetadataBuilder`.
            output: (N, H, D), written to.
        """
        if attn_metadata is None:
            # The engine measures memory before there are pages.
            return output.fill_(0)
        served = getattr(attn_metadata, "served", None)
        own = None if served is None else served.layers.get(layer.layer_name)
        if own is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("outputs are not quantized by the backend of mm_sparse")
        tokens = attn_metadata.num_actual_tokens
        q, k, v = query[:tokens], *kv_cache.split(self.head_size, -1)
        step: PagedStep = attn_metadata.step
        if not step.rows:
            own.describe(q, k, step, self.scale)
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output)
        own.attend(q, k, v, step, self.scale, output[:tokens])
        for part in attn_metadata.dense_parts:
            x = part.tokens
            super().forward(layer, query[x], key[x], value[x], kv_cache, part.metadata, output[x])
        return output

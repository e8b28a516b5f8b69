"""The attention backend that vLLM knows as CUSTOM."""

# vLLM is no dependency of this package.
# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from mm_sparse.integrations.vllm.builder import SparseMetadataBuilder
from mm_sparse.integrations.vllm.implementation import SparseAttention


class SparseBackend(FlashAttentionBackend):
    """FlashAttention's pages and kernels for what is dense, this package's for the rest.

    Layers with a sliding window, a soft cap or learned sinks run as they do without it.
    """

    @staticmethod
    def get_name() -> str:
        """What the engine calls a backend that it does not ship."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SparseAttention]:
        return SparseAttention

    @staticmethod
    def get_builder_cls() -> type[SparseMetadataBuilder]:
        return SparseMetadataBuilder

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Images that see themselves in both directions are not served."""
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """They would move pages without their descriptors."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Parts of lists depend on how many sequences there are."""
        return False

    @classmethod
    def supports_combination(cls, *args: Any, **kwargs: Any) -> str | None:
        head_size = kwargs.get("head_size", args[0] if args else 0)
        if head_size > 256:
            return "head sizes above 256 are not served by mm_sparse"
        return super().supports_combination(*args, **kwargs)

"""What vLLM calls in each of its processes: the backend gets its name, and nothing is loaded."""

# vLLM is no dependency of this package.
# pyright: reportMissingImports=false
from __future__ import annotations

BACKEND = "mm_sparse.integrations.vllm.backend.SparseBackend"


def register() -> None:
    """Make this package's attention known to vLLM as the backend CUSTOM.

    The entry point `mm_sparse` of `vllm.general_plugins`. It may be called any number of times.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)

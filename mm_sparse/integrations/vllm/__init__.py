"""Sparse attention as a backend of vLLM; the engine finds it as a plug-in."""

from mm_sparse._exports import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)

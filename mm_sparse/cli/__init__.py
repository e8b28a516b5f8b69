"""The command mm-sparse."""

from mm_sparse._exports import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)

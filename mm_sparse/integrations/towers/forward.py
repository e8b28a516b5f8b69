"""What stands before the forward of an attention module."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm_sparse.integrations.layer import SparseLayer


class Forward:
    """Stands before a module's forward.

    Args:
        layer: serves the module.
        before: a forward that the module itself had, None for its class's.
    """

    def __init__(self, layer: SparseLayer, before: Callable[..., Any] | None) -> None:
        self.layer, self.before = layer, before

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What the module does without us."""
        module = self.layer.module
        forward = self.before or type(module).forward.__get__(module)
        return forward(*args, **kwargs)

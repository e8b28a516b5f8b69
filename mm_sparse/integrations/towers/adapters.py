"""Adapters: which modules of a library compute attention, and what their tokens are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mm_sparse.integrations.discovery import forward_source
from mm_sparse.integrations.tower_tokens import TowerTokens
from mm_sparse.modality import Modality

FUSED = "scaled_dot_product_attention"


class TowerAdapter:
    """Makes the attention modules of one library known to `sparsify`; subclass it.

    The modules must call torch's `scaled_dot_product_attention` once in a forward, on
    (B, H, N, D) queries, or be `nn.MultiheadAttention`. The module keeps its projections, norms and
    rotations; attention alone is replaced.

    Example:
        >>> class MyTower(mms.TowerAdapter):
        ...     name = "my_library"
        ...     def matches(self, name, module, parents):
        ...         return isinstance(module, my_library.SelfAttention)
        ...     def tokens(self, name, module, parents):
        ...         return TowerTokens(mms.Modality.IMAGE, prefix=1)
        >>> mms.register_adapter(MyTower())
    """

    name: str = ""
    """Of the library, in messages."""

    def matches(self, name: str, module: nn.Module, parents: Sequence[nn.Module]) -> bool:
        """Whether a module is self-attention of the library.

        Args:
            name: of the module in the model, with dots.
            parents: modules around it, outermost first.
        """
        raise NotImplementedError(f"{type(self).__name__} must write matches")

    def tokens(self, name: str, module: nn.Module, parents: Sequence[nn.Module]) -> TowerTokens:
        """What the tokens of the module are: modality, tokens in front, grid."""
        return TowerTokens(Modality.TEXT)

    def refusal(self, module: nn.Module) -> str | None:
        """Why a module that matches cannot run sparse; None if it can."""
        if isinstance(module, nn.MultiheadAttention):
            return None
        called = f"{FUSED}(" in forward_source(type(module))
        return None if called else f"its forward does not call {FUSED}"


class ModuleAdapter(TowerAdapter):
    """The adapter of `sparsify(modules=[...])`: instances of some classes, in one model."""

    name = "modules"

    def __init__(self, classes: Sequence[type[nn.Module]]) -> None:
        for cls in classes:
            if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
                raise TypeError(f"modules must hold classes of torch.nn.Module, got {cls!r}")
        self.classes = tuple(classes)

    def matches(self, name: str, module: nn.Module, parents: Sequence[nn.Module]) -> bool:
        return isinstance(module, self.classes)


_ADAPTERS: list[TowerAdapter] = []


def register_adapter(adapter: TowerAdapter) -> None:
    """Make `sparsify` ask an adapter for attention modules, before the built-in ones.

    An adapter replaces one of the same name.

    Raises:
        TypeError: it is no `TowerAdapter`.
        ValueError: it has no name.
    """
    if not isinstance(adapter, TowerAdapter):
        raise TypeError(f"adapter must be a TowerAdapter, got {type(adapter).__name__}")
    if not adapter.name:
        raise ValueError(f"adapter must have a name, {type(adapter).__name__} has none")
    _ADAPTERS[:] = [known for known in _ADAPTERS if known.name != adapter.name]
    _ADAPTERS.append(adapter)


def registered_adapters() -> tuple[TowerAdapter, ...]:
    """Adapters in the order in which they were registered."""
    return tuple(_ADAPTERS)

"""Scorers by name: what `sparsify(scorer="fine")` and files of scorers look up."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TypeVar

from mm_sparse.scorers.base import Scorer

S = TypeVar("S", bound=type[Scorer])
_SCORERS: dict[str, type[Scorer]] = {}
# Modules that register the scorers of this package when they are imported.
_BUILT_IN = ("relevance", "fine")


def register_scorer(name: str) -> Callable[[S], S]:
    """Class decorator: make a scorer known by a name, so that it saves and loads like any other.

    Example:
        >>> @mms.register_scorer("norm")
        ... class KeyNormScorer(mms.Scorer): ...
        >>> mms.sparsify(model, config, scorer="norm")

    Args:
        name: what `sparsify(scorer=...)` takes.
    Raises:
        TypeError: the class is no `Scorer`, or name is no string.
        ValueError: the name is taken by another class.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name must be a string, got {name!r}")

    def register(cls: S) -> S:
        if not (isinstance(cls, type) and issubclass(cls, Scorer)):
            raise TypeError(f"register_scorer must decorate a subclass of Scorer, got {cls!r}")
        known = _SCORERS.get(name)
        # The same class comes again where a module is reloaded or a notebook cell is run twice.
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"name must be new, {name!r} is that of {known.__name__}")
        _SCORERS[name] = cls
        return cls

    return register


def registered_scorers() -> dict[str, type[Scorer]]:
    """Every registered scorer by name."""
    for module in _BUILT_IN:
        import_module(f"mm_sparse.scorers.{module}")
    return dict(sorted(_SCORERS.items()))


def scorer_class(name: str) -> type[Scorer] | None:
    """A registered scorer by its name or by the name of its class; None if there is none."""
    known = registered_scorers()
    by_class = {cls.__name__: cls for cls in known.values()}
    return known.get(name) or by_class.get(name)

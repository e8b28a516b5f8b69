"""Properties of a plan that are found once for all plans of the same pieces."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from mm_sparse.layout.plan import Plan

R = TypeVar("R")


class memo_by_blocks(Generic[R]):
    """A property that tiles and units alone decide: found once for all configs that cut alike."""

    def __init__(self, find: Callable[[Plan], R]) -> None:
        self.find, self.__doc__ = find, find.__doc__

    def name(self, plan: Plan) -> Hashable:
        """What it is known as."""
        return self.find.__name__

    def __get__(self, plan: Plan, owner: type | None = None) -> R:
        return self if plan is None else plan.memoize(self.name(plan), lambda: self.find(plan))


class memo_by_config(memo_by_blocks[R]):
    """The same for one that the config has a say in: calls with descriptors share it, too."""

    def name(self, plan: Plan) -> Hashable:
        return self.find.__name__, plan.config

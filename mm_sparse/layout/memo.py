"""Properties of a plan that are computed once for all plans of the same tiles and units."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from mm_sparse.layout.plan import Plan

R = TypeVar("R")


class memo_by_blocks(Generic[R]):
    """A property that tiles and units alone decide: configs that differ in budgets share it."""

    def __init__(self, compute: Callable[[Plan], R]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__
        self.key = compute.__name__

    def __get__(self, plan: Plan, owner: type | None = None) -> R:
        if plan is None:
            return self  # type: ignore[return-value]
        memo, key = plan.memo, self.key
        if key not in memo:
            memo[key] = self.compute(plan)
        return memo[key]


class memo_by_config(memo_by_blocks[R]):
    """A property that the config decides, too."""

    def __get__(self, plan: Plan, owner: type | None = None) -> R:
        if plan is None:
            return self  # type: ignore[return-value]
        memo, key = plan.memo, (self.key, plan.config)
        if key not in memo:
            memo[key] = self.compute(plan)
        return memo[key]

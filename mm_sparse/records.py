"""What a layer remembers of its last call, for `report`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from mm_sparse.plan import Plan
from mm_sparse.selection import Selection


@dataclass(frozen=True, eq=False)
class Kept:
    """The lists of every n-th tile of a selection; a Selection again once somebody asks."""

    index: Tensor
    count: Tensor
    plan: Plan
    step: int

    @cached_property
    def selection(self) -> Selection:
        """Of the tiles that are left."""
        if self.step == 1:
            return Selection(self.index, self.count, self.plan)
        some = slice(None, None, self.step)
        plan = replace(
            self.plan,
            tiles=self.plan.tiles[:, some],
            hull=self.plan.hull[:, some],
            tile_modality=self.plan.tile_modality[:, some],
            regular_tiles=False,
        )
        return Selection(self.index, self.count, plan)


def thinned(selection: Selection, entries: int) -> Kept:
    """The lists of every n-th tile, so that `index` has about `entries`; all if it has no more."""
    step = max(-(-selection.index.numel() // entries), 1)
    index, count, plan = selection.index, selection.count, selection.plan
    if step > 1:
        index, count = index[:, :, ::step].clone(), count[:, :, ::step].clone()
    return Kept(index, count, plan, step)


@dataclass(frozen=True, eq=False)
class Record:
    """The last call of a layer."""

    mode: str
    reason: str
    queries: int
    keys: int
    kept: Kept | None = None

    @property
    def selection(self) -> Selection | None:
        """What the call kept, or every n-th tile of it; None where it ran dense."""
        return None if self.kept is None else self.kept.selection

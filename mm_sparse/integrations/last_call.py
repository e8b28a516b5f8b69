"""What a layer remembers of its last call, for `report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from mm_sparse.layout import Plan
from mm_sparse.selection import Selection


@dataclass(frozen=True, eq=False)
class SelectionSnapshot:
    """The lists of every n-th tile of a selection; a Selection again once somebody asks."""

    index: Tensor
    plan: Plan
    step: int

    @cached_property
    def selection(self) -> Selection:
        """Of the tiles that are left."""
        # Counted now: a copy of the counts would be one more launch in every call.
        count = (self.index >= 0).sum(-1, dtype=torch.int32)
        if self.step == 1:
            return Selection(self.index, count, self.plan)
        return Selection(self.index, count, self.plan.select_tiles(slice(None, None, self.step)))


def thinned(selection: Selection, entries: int) -> SelectionSnapshot:
    """The lists of every n-th tile, so that `index` has about `entries`; all if it has no more."""
    step = max(-(-selection.index.numel() // entries), 1)
    index = selection.index
    return SelectionSnapshot(
        index[:, :, ::step].clone() if step > 1 else index, selection.plan, step
    )


def joined(parts: Sequence[SelectionSnapshot]) -> SelectionSnapshot:
    """What blocks of queries kept, one after the other, as one call would have."""
    selections = [part.selection for part in parts]
    first, width = selections[0].plan, max(s.index.shape[-1] for s in selections)
    plans = [s.plan for s in selections]
    starts = [plan.query_offset - first.query_offset for plan in plans]
    plan = replace(
        first,
        num_queries=sum(plan.num_queries for plan in plans),
        tiles=torch.cat([_from(p.tiles, at) for p, at in zip(plans, starts, strict=True)], 1),
        span=torch.cat([p.span for p in plans], 1),
        tile_span=torch.cat([p.tile_span for p in plans], 1),
        tile_modality=torch.cat([p.tile_modality for p in plans], 1),
        tile_offset=-1,
    )
    index = [pad(s.index, (0, width - s.index.shape[-1]), value=-1) for s in selections]
    return SelectionSnapshot(torch.cat(index, 2), plan, 1)


def _from(tiles: Tensor, start: int) -> Tensor:
    """(B, T, 2) with the first tokens counted from `start` tokens before."""
    return torch.stack([tiles[..., 0] + start, tiles[..., 1]], -1)


@dataclass(frozen=True, eq=False)
class LastCall:
    """The last call of a layer."""

    mode: str
    reason: str
    queries: int
    keys: int
    kept: SelectionSnapshot | None = None

    @property
    def selection(self) -> Selection | None:
        """What the call kept, or every n-th tile of it; None where it ran dense."""
        return None if self.kept is None else self.kept.selection

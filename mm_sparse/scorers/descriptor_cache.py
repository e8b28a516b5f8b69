"""Descriptors of keys beside a KV cache: what is new is described, the rest was before.

B batch, K KV heads, M key tokens, U units
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mm_sparse.layout import Plan

# Room beyond an eighth of what is there, for units that are still to come.
SPARE_UNITS = 64


class DescriptorCache:
    """What a scorer makes of the units of one layer's keys, for calls between which keys only grow.

    A step of decoding reads all keys to rank them, unless their descriptors are kept: with units of
    16 tokens those are a sixteenth of the keys. Give one to every call of `sparse_attention` (or of
    a scorer) for the layer and the sequence, as you do with its KV cache, and `clear` it when that
    changes: another prompt, rows that were reordered or dropped, tokens that were taken back. Keys
    that a call has seen are not looked at again, except those of a unit that was not full. What is
    new is written behind what was there; `copy.deepcopy` makes a cache with a memory of its own.

    Only calls without gradients use it. A scorer of your own has to ask for it
    (`mm_sparse.scorers.cached_descriptors`); one that does not ranks as it does without.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything: the next call describes all its keys."""
        # (B, K, at least U, ...): room for units to come, so that a step copies its own alone.
        self._room: Tensor | None = None
        self._pieces: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._tokens = 0

    def __len__(self) -> int:
        """Key tokens of the last call."""
        return self._tokens

    def update(self, k: Tensor, plan: Plan, describe: Callable[[Plan], Tensor]) -> Tensor:
        """(B, K, U, ...): descriptors of a call's units, those of new and changed units made anew.

        Args:
            k: (B, K, M, D).
            describe: makes them for the units of the plan that it is given.
        Raises:
            ValueError: not the rows and heads of the call before, or fewer keys.
        """
        room = self._room
        if room is None or self._pieces is None:
            room = describe(plan)
        else:
            if k.shape[:2] != room.shape[:2] or k.shape[2] < self._tokens:
                raise ValueError(
                    f"k must have {tuple(room.shape[:2])} rows and heads and at least "
                    f"{self._tokens} tokens as in the call before, got {tuple(k.shape[:3])}; "
                    "clear() the descriptors when the sequence is another"
                )
            same = units_alike(plan, *self._pieces)
            if not same:
                room = describe(plan)
            elif same < plan.units.shape[1]:
                # Layers that share a plan share what of it is new.
                part = partial(without_units, plan, same)
                new = describe(plan.memoize(("without", same, plan.config), part))
                room = _with_room(room, same, plan.units.shape[1], new)
                room[:, :, same : plan.units.shape[1]] = new
        self._room = room
        self._pieces = (plan.units, plan.unit_modality, plan.layout.order)
        self._tokens = k.shape[2]
        return room[:, :, : plan.units.shape[1]]


def _with_room(room: Tensor, used: int, wanted: int, new: Tensor) -> Tensor:
    """Room for `wanted` units and more in the dtype of `new`, the `used` first ones in it."""
    # What was made in inference mode cannot be written to outside of it.
    locked = room.is_inference() and not torch.is_inference_mode_enabled()
    if room.shape[2] >= wanted and room.dtype == new.dtype and not locked:
        return room
    batch, heads, _, *width = room.shape
    more = new.new_empty(batch, heads, wanted + wanted // 8 + SPARE_UNITS, *width)
    more[:, :, :used] = room[:, :, :used]
    return more


def units_alike(plan: Plan, units: Tensor, modality: Tensor, order: Tensor | None = None) -> int:
    """How many units in front are those of another plan's tables, in all rows.

    Args:
        units: (B, U, 2), as `Plan.units`.
        modality: (B, U), as `Plan.unit_modality`.
        order: (B or 1, M), as `TokenLayout.order`.
    """

    if units is plan.units and order is plan.layout.order:
        return units.shape[1]

    def count() -> tuple[Tensor, Tensor | None, int]:
        most = min(units.shape[1], plan.units.shape[1])
        same = (plan.units[:, :most] == units[:, :most]).all(-1)
        same &= plan.unit_modality[:, :most] == modality[:, :most]
        if order is not None or plan.layout.order is not None:
            same &= units[:, :most].sum(-1) <= _unmoved(plan, order)
        return units, order, int(same.all(0).long().cumprod(0).sum())

    # Layers that share plans share the answer, and the wait for it. Their tables are held with it,
    # so that no other tables can have their ids.
    return plan.memoize(("alike", id(units), id(order)), count)[2]


def _unmoved(plan: Plan, order: Tensor | None) -> Tensor:
    """(B or 1, 1): tokens in front that are in the same place in a plan's order and in another."""
    position = torch.arange(plan.layout.length, device=plan.units.device)[None]
    now, before = (position if x is None else x for x in (plan.layout.order, order))
    most = min(now.shape[1], before.shape[1])
    return (now[:, :most] == before[:, :most]).long().cumprod(1).sum(1, keepdim=True)


def without_units(plan: Plan, first: int) -> Plan:
    """The plan without the units before `first`, for those who describe units."""
    rest = replace(
        plan,
        units=plan.units[:, first:].contiguous(),
        unit_modality=plan.unit_modality[:, first:].contiguous(),
        unit_offset=-1,
    )
    # Who describes asks which modalities there are: to look would wait for the device.
    rest.memo["modalities"] = plan.modalities
    return rest


def cached_descriptors(
    k: Tensor, plan: Plan, describe: Callable[[Plan], Tensor], cache: DescriptorCache | None
) -> Tensor:
    """(B, K, U, ...): what `describe` makes of the plan's units, of new units only with a cache."""
    if cache is None or torch.is_grad_enabled():
        return describe(plan)
    return cache.update(k, plan, describe)

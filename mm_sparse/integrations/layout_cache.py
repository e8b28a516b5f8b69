"""The layout of one call of a layer: ranges of keys from a mask that exists, or from none.

B batch, N query tokens, M key tokens
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from mm_sparse.kernels.device import captures
from mm_sparse.layout import CallLayout

# Shapes that came without a mask, such as the windows of a vision tower, whose layouts are kept.
PLAIN_LAYOUTS = 8
# Entries of a mask up to which it is compared with the one before.
COMPARED = 1 << 20


class PlainLayouts(dict[Any, CallLayout]):
    """Layouts of calls without a mask by their key, and all layouts that CUDA graphs read."""

    def __init__(self) -> None:
        super().__init__()
        self._captured: dict[int, CallLayout] = {}

    def __reduce__(self) -> Any:
        return PlainLayouts, ()

    def make_room(self) -> None:
        """Forget the oldest of more layouts than are kept."""
        for key in list(self)[:-PLAIN_LAYOUTS]:
            self.pop(key, None)

    def keep_captured(self, call: CallLayout) -> None:
        """Keep a layout as long as the model if a CUDA graph is being captured that reads it."""
        if captures(call.layout.device):
            self._captured[id(call)] = call


class LayoutCache:
    """Layouts that were made of the masks that came last, so that a forward makes each once.

    Threads may use it at the same time: what is stored is replaced as a whole.
    """

    def __init__(self) -> None:
        self._last: tuple[list[tuple[weakref.ref[Tensor], int]], dict[Any, CallLayout]] = [], {}
        """The masks that came last with their versions, and the layouts made of them."""
        self._last_entries: tuple[list[Tensor], dict[Any, CallLayout]] = [], {}
        """The same for masks without a version, by their entries."""

    def __reduce__(self) -> Any:
        return LayoutCache, ()

    def of(self, masks: tuple[Tensor, ...]) -> dict[Any, CallLayout]:
        """What was made of these very masks, unless they were written to since."""
        if any(mask.is_inference() for mask in masks):
            return self._of_equal(masks)
        last, layouts = self._last
        same = len(masks) == len(last) and all(
            ref() is mask and version == mask._version
            for mask, (ref, version) in zip(masks, last, strict=True)
        )
        if not same:
            layouts = {}
            self._last = [(weakref.ref(mask), mask._version) for mask in masks], layouts
        return layouts

    def _of_equal(self, masks: tuple[Tensor, ...]) -> dict[Any, CallLayout]:
        """The same of masks that do not count what is written to them: those of equal entries."""
        rows = [one_for_all(mask) for mask in masks]
        if any(row.numel() > COMPARED for row in rows):
            return {}
        last, layouts = self._last_entries
        same = len(rows) == len(last) and all(
            (row.shape, row.dtype, row.device) == (before.shape, before.dtype, before.device)
            and torch.equal(row, before)
            for row, before in zip(rows, last, strict=True)
        )
        if not same:
            layouts = {}
            self._last_entries = [row.clone() for row in rows], layouts
        return layouts


def one_for_all(mask: Tensor) -> Tensor:
    """The part for one query of a mask that is expanded over queries, others as they are."""
    expanded = mask.dim() > 1 and mask.stride(-2) == 0 and mask.shape[-2] > 1
    return mask[..., :1, :] if expanded else mask

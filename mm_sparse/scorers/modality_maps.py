"""Linear maps from features of pieces to descriptors, one per modality, folded into one product.

B batch, P pieces, M modalities that have a map, F features, E descriptor
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mm_sparse.layout import Plan


class WeightCache:
    """What was made of tensors, until one of them changes or something else is asked for."""

    def __init__(self) -> None:
        self._state: Any = None
        self._made: Any = None

    def __reduce__(self) -> Any:
        return WeightCache, ()

    def get(self, tensors: Sequence[Tensor], asked: Any, make: Callable[[], Any]) -> Any:
        """What `make` gave when these very tensors had these values and `asked` was the same."""
        if any(x.is_inference() for x in tensors):
            return make()
        state = (asked, *((x.data_ptr(), x._version) for x in tensors))
        if self._state != state:
            self._state, self._made = state, make()
        return self._made


def describe(
    x: Tensor, maps: Tensor, map_of: Tensor, modalities: Sequence[int], modality: Tensor, plan: Plan
) -> Tensor:
    """(B, heads, P, F) -> (B, heads, P, E), each piece by the map of its modality.

    Args:
        maps: (M + 1, heads, F, E), the last for modalities without one and for padding.
        map_of: (all modalities,), place of each in `maps`, -1 for none.
        modalities: the M modalities, in order.
        modality: (B, P), -1 for padding.
    """
    x = x.to(maps.dtype)
    present = plan.modalities
    if len(present) <= 1 and present <= set(modalities):
        # Padding is never chosen: it may take any map.
        own = modalities.index(next(iter(present))) if present else 0
        return x @ maps[own]
    every = (x @ maps.permute(1, 2, 0, 3).flatten(2)).unflatten(-1, (len(maps), -1))
    own = map_of[modality.long().clamp(min=0)].masked_fill(modality < 0, -1)
    own = own.masked_fill(own < 0, len(maps) - 1)
    own = own[:, None, :, None, None].expand(-1, x.shape[1], -1, 1, maps.shape[-1])
    return every.gather(3, own).squeeze(3)

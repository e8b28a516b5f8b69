"""Linear maps from features of pieces to descriptors, one per modality, folded into one product.

B batch, P pieces, M modalities that have a map, F features, E descriptor
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mm_sparse.kernels.device import stream_of
from mm_sparse.modality import Modality


class WeightCache:
    """What was made of tensors, until one of them changes; threads may use it at the same time."""

    def __init__(self) -> None:
        self._made: dict[Any, tuple[Any, Any]] = {}

    def __reduce__(self) -> Any:
        return WeightCache, ()

    def get(self, tensors: Sequence[Tensor], asked: Any, make: Callable[[], Any]) -> Any:
        """What `make` gave when these very tensors had these values and `asked` was the same.

        Each stream makes its own; that of a CUDA graph stays where the graph reads it.
        """
        if any(x.is_inference() for x in tensors):
            return make()
        state = tuple((x.data_ptr(), x._version) for x in tensors)
        key = asked, stream_of(tensors[0].device)
        before, made = self._made.get(key, (None, None))
        if before != state:
            made = make()
            self._made[key] = state, made
        return made


def describe(
    x: Tensor, maps: Tensor, map_of: Tensor, places: Sequence[int], modality: Tensor,
    present: frozenset[int],
) -> Tensor:  # fmt: skip
    """(B, heads, P, F) -> (B, heads, P, E), each piece by the map of its modality.

    Args:
        maps: (M + 1, heads, F, E), the last for modalities without one and for padding.
        map_of: (all modalities,), place of each in `maps`, -1 for none.
        places: the same numbers, which nobody waits for.
        modality: (B, P), -1 for padding.
        present: modalities that pieces may have.
    """
    x = x.to(maps.dtype)
    needed = {places[kind] for kind in present}
    if len(needed) <= 1 and -1 not in needed:
        # Padding is never chosen: it may take any map.
        return x @ maps[next(iter(needed), 0)]
    every = (x @ maps.permute(1, 2, 0, 3).flatten(2)).unflatten(-1, (len(maps), -1))
    own = map_of[modality.long().clamp(min=0)].masked_fill(modality < 0, -1)
    own = own.masked_fill(own < 0, len(maps) - 1)
    own = own[:, None, :, None, None].expand(-1, x.shape[1], -1, 1, maps.shape[-1])
    return every.gather(3, own).squeeze(3)


def add_video(
    state: dict[str, Tensor],
    name: str,
    dims: Sequence[int],
    wanted: Tensor,
    place: int = int(Modality.VIDEO),
    image: int = int(Modality.IMAGE),
) -> None:
    """Give a tensor that was stored with one modality less what it has for IMAGE at VIDEO's place.

    Video was counted as IMAGE before it was a modality.

    Args:
        state: tensors by name; that of `name` is replaced if it lacks one entry along `dims`.
        wanted: the tensor that is to be loaded.
        place, image: indices of VIDEO and IMAGE along `dims`.
    """
    value = state.get(name)
    if value is None or value.dim() != wanted.dim():
        return
    missing = [more - given for more, given in zip(wanted.shape, value.shape, strict=True)]
    if missing != [int(dim in dims) for dim in range(value.dim())]:
        return
    for dim in dims:
        order = list(range(value.shape[dim]))
        order.insert(place, order[image - (image > place)])
        value = value.index_select(dim, torch.tensor(order, device=value.device))
    state[name] = value

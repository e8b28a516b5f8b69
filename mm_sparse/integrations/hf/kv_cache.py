"""Descriptors beside the KV cache of a transformers model, as long as nobody else changes its keys.

Each layer of a `DynamicCache` carries those of its own keys. The cache makes a new tensor of keys
for every step, and whoever reorders, crops or replaces keys makes one, too: if a step finds the
very tensor that the step before has left, what was described is still true of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mm_sparse.attention import DecodingGeometry, LayerDecoding
from mm_sparse.config import SparseConfig
from mm_sparse.scorers import DescriptorCache, Scorer

HELD = "_mm_sparse_descriptors"


class LayerDescriptors:
    """What a layer of a cache carries."""

    def __init__(self) -> None:
        self.descriptors = DescriptorCache()
        self.intact = False
        """Whether the running forward found the keys as the one before left them."""
        self.scorer: Any = None
        self.decoding: LayerDecoding | None = None
        """What steps of decoding keep of these keys."""
        self._keys: Any = None

    def __reduce__(self) -> Any:
        # A copy of the cache has keys of its own.
        return LayerDescriptors, ()

    def remember(self, keys: Tensor, scorer: Any) -> None:
        """These are the keys that are described, by this scorer."""
        self.intact = False
        self.scorer = scorer
        self._keys = weakref.ref(keys), _version(keys)

    def describes(self, keys: Any) -> bool:
        """Whether they are the remembered ones, and nobody has written to them."""
        if self._keys is None or not isinstance(keys, Tensor):
            return False
        known, version = self._keys
        return known() is keys and _version(keys) == version


def check_unchanged(cached: Any) -> None:
    """Before a forward: which layers of its KV cache are as the forward before left them."""
    for layer in getattr(cached, "layers", ()):
        held = vars(layer).get(HELD)
        if held is not None:
            held.intact = held.describes(getattr(layer, "keys", None))


def descriptors_for(
    cached: Any, index: int | None, keys: Tensor, scorer: Scorer
) -> DescriptorCache | None:
    """Descriptors for the keys of a layer's call; None if these are not what the cache holds."""
    layers = getattr(cached, "layers", ())
    if index is None or index >= len(layers) or torch.is_grad_enabled():
        return None
    layer = layers[index]
    if getattr(layer, "keys", None) is not keys:
        return None
    held, known = vars(layer).get(HELD), _known(scorer)
    if held is None or not held.intact or held.scorer != known:
        held = LayerDescriptors()
        setattr(layer, HELD, held)
    held.remember(keys, known)
    return held.descriptors


GEOMETRIES = "_mm_sparse_geometries"


def decoding_for(
    cached: Any, index: int | None, keys: Tensor, tokens: int, scorer: Scorer,
    config: SparseConfig, make: Callable[[], tuple[Any, Callable[[], DecodingGeometry]]],
) -> LayerDecoding | None:  # fmt: skip
    """What a layer's steps keep, with its geometry written down for so many tokens.

    Args:
        cached: the KV cache of the model.
        keys: of the layer's call.
        tokens: M, the newest of them included.
        make: key of a geometry that layers share, and what makes it.
    """
    layers = getattr(cached, "layers", ())
    if index is None or index >= len(layers) or torch.is_grad_enabled():
        return None
    layer = layers[index]
    if getattr(layer, "keys", None) is not keys:
        return None
    held, known = vars(layer).get(HELD), _known(scorer)
    if held is None or not held.intact or held.scorer != known:
        held = LayerDescriptors()
        setattr(layer, HELD, held)
    decoding = held.decoding
    if decoding is None or decoding.config != config or not _goes_on(decoding.geometry, tokens):
        key, new = make()
        shared: dict[Any, DecodingGeometry] = vars(cached).setdefault(GEOMETRIES, {})
        geometry = shared.get(key)
        if geometry is None or not _goes_on(geometry, tokens):
            geometry = shared[key] = new()
        decoding = held.decoding = LayerDecoding(geometry, config, scorer)
    held.remember(keys, known)
    return decoding


def _goes_on(geometry: DecodingGeometry, tokens: int) -> bool:
    """Whether a geometry is written down for so many tokens, or for one less with room."""
    return geometry.tokens in (tokens, tokens - 1) and not geometry.full(tokens)


def _known(scorer: Scorer) -> tuple[Any, ...]:
    """The scorer and the state of its weights: other weights describe otherwise."""
    return scorer, *((id(p), _version(p)) for p in scorer.parameters())


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version

"""Descriptors beside the KV cache of a transformers model, as long as nobody else changes its keys.

Each layer of a `DynamicCache` carries those of its own keys. The cache makes a new tensor of keys
for every step, and whoever reorders, crops or replaces keys makes one, too: if a step finds the
very tensor that the step before has left, what was described is still true of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm_sparse.attention import DecodingGeometry, LayerDecoding
from mm_sparse.config import SparseConfig
from mm_sparse.layout import TokenLayout
from mm_sparse.scorers import DescriptorCache, Scorer

HELD = "_mm_sparse_descriptors"


class LayerDescriptors:
    """What a layer of a cache carries."""

    def __init__(self) -> None:
        self.descriptors = DescriptorCache()
        self.intact = False
        """Whether the running forward found the keys as the one before left them."""
        self.asked = False
        """Whether the last forward that was seen came here."""
        self.scorer: Any = None
        self.decoding: LayerDecoding | None = None
        """What steps of decoding keep of these keys."""
        self._keys: Any = None

    def __reduce__(self) -> Any:
        # A copy of the cache has keys of its own.
        return LayerDescriptors, ()

    def remember(self, keys: Tensor, scorer: Any) -> None:
        """These are the keys that are described, by this scorer."""
        self.intact, self.asked = False, True
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
            # Keys that were made in inference mode do not tell who has written to them.
            held.intact = held.asked and held.describes(getattr(layer, "keys", None))
            held.asked = False


def forget_asked(cached: Any) -> None:
    """Before a forward in a graph, which does not come here: its layers are not as they were."""
    for layer in getattr(cached, "layers", ()):
        held = getattr(layer, HELD, None)
        if held is not None:
            held.asked = False


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
    held, known = vars(layer).get(HELD), scorer_state(scorer)
    if held is None or not held.intact or held.scorer != known:
        held = LayerDescriptors()
        setattr(layer, HELD, held)
    held.remember(keys, known)
    return held.descriptors


GEOMETRIES = "_mm_sparse_geometries"


class Geometries(dict[Any, DecodingGeometry]):
    """What layers of a cache share."""

    def __reduce__(self) -> Any:
        # A copy of the cache has keys of its own.
        return Geometries, ()


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a layer asks of a cache."""

    key: Any
    """Layers with the same share a geometry."""
    tokens: int
    """M, the newest of them included."""
    config: SparseConfig
    """The layer's own."""
    scorer: Scorer
    recipe: Any
    """Of the mask of the running forward."""
    layout: Callable[[], TokenLayout]
    """Of the M tokens."""
    new: Callable[[], DecodingGeometry]
    """A geometry for this sequence."""
    again: bool
    """Whether this is a prefill: the sequence may be another one."""
    recorded: LayerDecoding | None = None
    """What a graph reads, to be written to if it has room."""


def cache_layer(cached: Any, index: int | None) -> Any:
    """The layer of a cache with a number; None if it has none."""
    layers = getattr(cached, "layers", ())
    return None if index is None or index >= len(layers) else layers[index]


def decoding_for(
    cached: Any, index: int | None, keys: Tensor, wanted: Wanted
) -> LayerDecoding | None:
    """What a layer's steps keep of its keys; None if these are not what the cache holds.

    Args:
        cached: the KV cache of the model.
        keys: of the layer's call.
        wanted: see `Wanted`.
    """
    layer = cache_layer(cached, index)
    if layer is None or getattr(layer, "keys", None) is not keys or torch.is_grad_enabled():
        return None
    held, known = vars(layer).get(HELD), scorer_state(wanted.scorer)
    if held is None:
        held = LayerDescriptors()
        setattr(layer, HELD, held)
    intact = held.intact and held.scorer == known and not wanted.again
    decoding = wanted.recorded or (None if wanted.again else held.decoding)
    if decoding is None or decoding.config != wanted.config or decoding.scorer is not wanted.scorer:
        decoding = None
    if decoding is not None and intact and not _hides_alike(decoding.geometry, wanted):
        intact = False
    if decoding is None or not intact or not _goes_on(decoding.geometry, wanted.tokens):
        geometry = _geometry(cached, wanted, intact, decoding)
        if decoding is None or decoding.geometry is not geometry:
            decoding = LayerDecoding(geometry, wanted.config, wanted.scorer)
            # Steps keep descriptors of their own.
            held.descriptors.clear()
        decoding.descriptors.stale = True
    held.decoding = decoding
    held.remember(keys, known)
    return decoding


def _geometry(
    cached: Any, wanted: Wanted, intact: bool, decoding: LayerDecoding | None
) -> DecodingGeometry:
    """That of the layers that were asked before in this forward, or written down anew."""
    shared: dict[Any, DecodingGeometry] = vars(cached).setdefault(GEOMETRIES, Geometries())
    if decoding is not None and wanted.recorded is decoding:
        # Another cache may lie where a graph expects the one before.
        shared.setdefault(wanted.key, decoding.geometry)
    geometry = shared.get(wanted.key)
    # Layers of one forward share its mask.
    known = None if geometry is None or geometry.sequence is None else geometry.sequence()
    if geometry is not None and known is wanted.recipe and not geometry.full(wanted.tokens):
        return geometry
    if geometry is not None and intact and _goes_on(geometry, wanted.tokens):
        return geometry
    if geometry is None or not geometry.begin(wanted.layout()):
        geometry = shared[wanted.key] = wanted.new()
    geometry.sequence = weakref.ref(wanted.recipe)
    return geometry


def _goes_on(geometry: DecodingGeometry, tokens: int) -> bool:
    """Whether a geometry is written down for so many tokens, or for one less with room."""
    return geometry.tokens in (tokens, tokens - 1) and not geometry.full(tokens)


def _hides_alike(geometry: DecodingGeometry, wanted: Wanted) -> bool:
    """Whether the mask of a step hides what those of the steps before hid."""
    padding = wanted.recipe.arguments.get("attention_mask")
    # The first layer that shares the geometry asks; it is written down for this step then.
    if padding is None or geometry.tokens != wanted.tokens - 1 or geometry.full(wanted.tokens):
        return True
    return geometry.hides_alike(padding.to(torch.bool), wanted.tokens)


def scorer_state(scorer: Scorer) -> tuple[Any, ...]:
    """The scorer and the state of its weights: other weights describe otherwise."""
    return scorer, *((id(p), p.data_ptr(), _version(p)) for p in scorer.parameters())


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version

"""Steps of decoding of transformers models: one query a row, keys in a cache that grows.

A step inside a compiled model is one operator, `mm_sparse::decode_step`: what it needs beside its
tensors was written down by the prefill, so a CUDA graph can record it.

B batch, H query heads, K KV heads, M tokens so far, C tokens that a static cache has room for,
D head dim
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mm_sparse._checks import autocast_inputs
from mm_sparse.attention import (
    DecodingGeometry,
    LayerDecoding,
    capacity_for,
    decodes_in_place,
)
from mm_sparse.config import SparseConfig
from mm_sparse.integrations.hf import kv_cache
from mm_sparse.integrations.hf.lazy_mask import LazyMask
from mm_sparse.integrations.last_call import LastCall, thinned
from mm_sparse.integrations.options import AttentionOptions
from mm_sparse.layout import TokenLayout

if TYPE_CHECKING:
    from mm_sparse.integrations.hf.attention import HFLayer

# Entries of a selection that a layer keeps for `report`.
KEPT_ENTRIES = 1 << 16
NUMBER = "_mm_sparse_step"
"""Attribute of a module: the number of its layer where steps in a graph are sparse."""
_LAYERS: weakref.WeakValueDictionary[int, HFLayer] = weakref.WeakValueDictionary()


def run_step(
    layer: HFLayer, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: AttentionOptions
) -> Tensor | None:
    """(B, 1, H, D) of a step on what the steps before left; None of calls of another kind.

    A call is a step if the model's cache has its keys and the query sees all of them.
    """
    tokens = _tokens_in_view(mask, q, k, options)
    if tokens is None or not _may_step(layer, q, k, v, mask, options, tokens):
        return None
    decoding = _decoding(layer, q, k, mask, options, tokens)
    if decoding is None:
        return None
    geometry = decoding.geometry
    if geometry.tokens != tokens:
        geometry.advance(tokens)
    out, selection = _attend(decoding, q, k, v, options.scale)
    layer.record = LastCall("sparse", "", 1, tokens, thinned(selection, KEPT_ENTRIES))
    return out


def prepare_steps(
    layer: HFLayer, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: AttentionOptions
) -> None:
    """After the prefill of a static cache: write down what steps in a graph need."""
    module = vars(layer.module)
    tokens = _tokens_in_view(mask, q, k, options)
    may = tokens is not None and _is_static(layer, k)
    if not may or not _may_step(layer, q, k, v, mask, options, tokens or 0):
        module.pop(NUMBER, None)
        return
    decoding = _decoding(layer, q, k, mask, options, tokens or 0, again=True)
    if decoding is None:
        module.pop(NUMBER, None)
        return
    geometry = decoding.geometry
    if geometry.tokens != tokens:
        geometry.advance(tokens or 0)
    if geometry.leader is None or geometry.leader() is None:
        geometry.leader = weakref.ref(layer)
    scale = _scale(q, options.scale)
    decoding.describe(*autocast_inputs(q[:, :, -1:], k), scale)
    layer.static_steps[k.data_ptr()] = decoding
    if module.get(NUMBER) != id(layer):
        _LAYERS[id(layer)] = layer
        module[NUMBER] = id(layer)


def traced_step(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None
) -> Tensor:
    """(B, 1, H, D) of a step in a graph.

    Args:
        mask: (B, 1, 1, C) bool, what the query sees.
    """
    return decode_step(q, k, v, mask, getattr(module, NUMBER), _scale(q, scale))


@torch.library.custom_op("mm_sparse::decode_step", mutates_args=())
def decode_step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, number: int, scale: float) -> Tensor:
    """(B, 1, H, D) of the newest token of a static cache.

    Args:
        q: (B, H, 1, D).
        k, v: (B, K, C, D), of the cache.
        mask: (B, 1, 1, C) bool.
        number: of the layer, whose prefill came before.
    """
    layer = _LAYERS.get(number)
    decoding = None if layer is None else layer.static_steps.get(k.data_ptr())
    if layer is None or decoding is None:
        raise ValueError(
            "a compiled step must come after a prefill of the same static cache that was not "
            "compiled, got keys that no prefill has written"
        )
    geometry = decoding.geometry
    if geometry.leader is not None and geometry.leader() is layer:
        position = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
        geometry.advance_to((mask[:, 0, -1] * position).amax())
    out, _ = _attend(decoding, q, k, v, scale)
    # What this step computed lies in memory of the graph.
    geometry.forget_step()
    # A recorded graph reads the tables where they are.
    layer.recorded[id(decoding)] = decoding
    return out.contiguous()


@decode_step.register_fake
def _(q, k, v, mask, number, scale):
    return q.new_empty(q.shape[0], 1, q.shape[1], v.shape[-1])


def _attend(
    decoding: LayerDecoding, q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> tuple[Tensor, Any]:
    q, k, v = autocast_inputs(q, k, v)
    width = v.shape[-1]
    if width < k.shape[-1]:
        v = pad(v, (0, k.shape[-1] - width))
    out, selection = decoding.step(q, k, v, _scale(q, scale))
    return out[..., :width].transpose(1, 2), selection


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _may_step(
    layer: HFLayer, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: AttentionOptions,
    tokens: int,
) -> bool:  # fmt: skip
    """Whether a step of the layer with so many tokens is sparse and needs no plan of its own."""
    settings = layer.shared.settings
    if settings.watchers or settings.attention_override or torch.is_grad_enabled():
        return False
    if layer.modality is not None or layer.packed:
        return False
    if decodes_in_place(settings.config, layer.ranks) is not None:
        return False
    if layer.early_mode(tokens, q.device, settings.config, steps=True)[0] != "sparse":
        return False
    return layer.problem(q, k, v, mask, options) is None


def _tokens_in_view(mask: Any, q: Tensor, k: Tensor, options: AttentionOptions) -> int | None:
    """M, where the newest query sees all keys that are there, padding apart; else None."""
    if not isinstance(mask, LazyMask) or options.sliding_window:
        return None
    recipe = mask.recipe
    rows, queries, keys = recipe.shape
    if rows not in (1, q.shape[0]) or queries != q.shape[2] or keys != k.shape[2]:
        return None
    if not recipe.is_causal or recipe.offsets[1]:
        return None
    tokens = recipe.first + queries
    return tokens if tokens <= keys else None


def _is_static(layer: HFLayer, k: Tensor) -> bool:
    held = kv_cache.cache_layer(layer.source.tracker.running.cache, layer.index)
    return held is not None and held.keys is k and bool(getattr(held, "is_compileable", False))


def _decoding(
    layer: HFLayer, q: Tensor, k: Tensor, mask: Any, options: AttentionOptions, tokens: int,
    again: bool = False,
) -> LayerDecoding | None:  # fmt: skip
    """What the layer keeps of the keys; None where the cache does not hold them."""
    config = layer.shared.layer_config(layer.index, layer.name, 0, layer.shared.config)
    group = q.shape[1] // k.shape[1]
    blocks = (config.tile, config.unit, config.sinks, config.window, config.query_pools)

    def layout() -> TokenLayout:
        whole = layer.source.layout_of_call(layer.module, q, k, mask, options).layout
        parts = (whole.modality, whole.segment, whole.document)
        return TokenLayout(*(x[:, :tokens] for x in parts))

    def new() -> DecodingGeometry:
        room = k.shape[2] if _is_static(layer, k) else max(k.shape[2], capacity_for(tokens))
        # Made to be written to in every mode of autograd.
        with torch.inference_mode(False), torch.no_grad():
            return DecodingGeometry(layout(), config, group, room)

    key = (blocks, config.floors and tuple(config.floors().items()), group, q.device)
    wanted = _Wanted(key, tokens, config, layer.ranks, layout, new, again)
    cache = layer.source.tracker.running.cache
    return kv_cache.decoding_for(cache, layer.index, k, wanted)


class _Wanted:
    """What a layer asks of a cache."""

    def __init__(
        self, key: Any, tokens: int, config: SparseConfig, scorer: Any,
        layout: Callable[[], TokenLayout], new: Callable[[], DecodingGeometry], again: bool,
    ) -> None:  # fmt: skip
        self.key, self.tokens, self.config, self.scorer = key, tokens, config, scorer
        self.layout, self.new, self.again = layout, new, again

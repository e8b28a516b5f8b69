"""Steps of decoding of transformers models: one query a row, keys in a cache that grows.

A step inside a compiled model is one operator, `mm_sparse::decode_step`: what it needs beside its
tensors was written down by the prefill, so a CUDA graph can record it.

B batch, H query heads, K KV heads, M tokens so far, C tokens that a static cache has room for,
D head dim
"""

from __future__ import annotations

import weakref
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mm_sparse._checks import autocast_inputs
from mm_sparse.attention import (
    DecodingGeometry,
    LayerDecoding,
    capacity_for,
    decodes_in_place,
)
from mm_sparse.integrations.hf import kv_cache
from mm_sparse.integrations.hf.lazy_mask import LazyMask
from mm_sparse.integrations.last_call import LastCall, thinned
from mm_sparse.integrations.layer import KEPT_ENTRIES, as_wide_as_keys, scale_of
from mm_sparse.integrations.options import AttentionOptions
from mm_sparse.layout import TokenLayout
from mm_sparse.modality import Modality

if TYPE_CHECKING:
    from mm_sparse.integrations.hf.attention import HFLayer

# Static caches of which a layer keeps what graphs read.
RECORDED = 4
NUMBER = "_mm_sparse_step"
"""Attribute of a module whose static cache has had a prefill: the number of its layer where steps
in a graph are sparse, `DENSE` where they are not."""
DENSE = -1
_NEWEST = "newest is text"
_NUMBERS = count()
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
    if not _newest_is_text(layer, mask, tokens):
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
    if not _is_static(layer, k):
        if options.sliding_window and _static_layer(layer) is not None:
            # Such a cache returns all keys of a prompt, and holds those of the window.
            module[NUMBER] = DENSE
        return
    tokens = _tokens_in_view(mask, q, k, options)
    place = k.data_ptr(), tuple(k.shape)
    recorded = layer.recorded.get(place)
    weights = kv_cache.scorer_state(layer.ranks)
    if recorded is not None and recorded.weights != weights:
        # What a scorer made of its weights lies elsewhere now.
        recorded = None
    config = layer.config_of_step()
    # A graph that was recorded for these keys goes by what is written down, whatever the length.
    least = None if recorded is None or recorded.config != config else 0
    if tokens is None or not _may_step(layer, q, k, v, mask, options, tokens, least):
        layer.recorded.pop(place, None)
        module[NUMBER] = DENSE
        return
    decoding = _decoding(layer, q, k, mask, options, tokens, recorded)
    if decoding is None:
        return
    geometry = decoding.geometry
    if geometry.tokens != tokens:
        geometry.advance(tokens)
    # The first layer of this prefill: the one before may be dense now, or of another model.
    if geometry.led is None or geometry.led() is not mask.recipe:
        geometry.leader, geometry.led = weakref.ref(layer), weakref.ref(mask.recipe)
    newest, keys, _ = autocast_inputs(q[:, :, -1:], k, v)
    decoding.describe(newest, keys, scale_of(q, options.scale))
    decoding.weights = weights
    if _record(layer, place, decoding, k) or _LAYERS.get(module.get(NUMBER, DENSE)) is not layer:
        number = module[NUMBER] = next(_NUMBERS)
        _LAYERS[number] = layer


def _record(layer: HFLayer, place: Any, decoding: LayerDecoding, k: Tensor) -> bool:
    """Keep what graphs read; True if one may read what is gone.

    Whoever compiled a step must then be given another number, to compile and to record anew.
    """
    known = layer.recorded.pop(place, None)
    gone = place in layer.forgotten or (known is not None and known is not decoding)
    layer.forgotten.discard(place)
    decoding.keys = weakref.ref(k)
    # Dead caches first, and then the oldest. A new cache often lies where a dead one was.
    for old in sorted(layer.recorded, key=lambda at: _is_alive(layer.recorded[at])):
        if len(layer.recorded) < RECORDED:
            break
        gone |= _is_alive(layer.recorded[old])
        layer.forgotten.add(old)
        del layer.recorded[old]
    layer.recorded[place] = decoding
    return gone


def forget_recorded(layer: HFLayer, k: Tensor) -> None:
    """A compiled prefill has written keys of this shape: what was written down may be of others."""
    old = [place for place in layer.recorded if place[1] == tuple(k.shape)]
    for place in old:
        del layer.recorded[place]
        layer.forgotten.add(place)
    if old:
        vars(layer.module)[NUMBER] = DENSE


def _is_alive(decoding: LayerDecoding) -> bool:
    return decoding.keys is not None and decoding.keys() is not None


def traced_step(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None
) -> Tensor:
    """(B, 1, H, D) of a step in a graph.

    Args:
        mask: (B, 1, 1, C) bool, what the query sees.
    """
    return decode_step(q, k, v, mask, getattr(module, NUMBER), scale_of(q, scale))


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
    if layer is None:
        raise ValueError(f"number must be that of a layer of a sparsified model, got {number}")
    decoding = layer.recorded.get((k.data_ptr(), tuple(k.shape)))
    if decoding is None:
        # Keys of a cache whose prefill ran dense, or was compiled.
        gqa = q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
        return out.transpose(1, 2).contiguous()
    geometry = decoding.geometry
    if geometry.leader is not None and geometry.leader() is layer:
        position = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
        geometry.advance_to((mask[:, 0, -1] * position).amax())
    out, _ = _attend(decoding, q, k, v, scale)
    # What this step computed lies in memory of the graph.
    geometry.forget_step()
    return out.contiguous()


@decode_step.register_fake
def _(q, k, v, mask, number, scale):
    return q.new_empty(q.shape[0], 1, q.shape[1], v.shape[-1])


def _attend(
    decoding: LayerDecoding, q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> tuple[Tensor, Any]:
    q, k, v = autocast_inputs(q, k, v)
    out, selection = decoding.step(q, k, as_wide_as_keys(v, k), scale_of(q, scale))
    return out[..., : v.shape[-1]].transpose(1, 2), selection


def _may_step(
    layer: HFLayer, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: AttentionOptions,
    tokens: int, least: int | None = None,
) -> bool:  # fmt: skip
    """Whether a step of the layer with so many tokens is sparse and needs no plan of its own.

    Args:
        least: tokens from which steps are sparse, if not those of the config.
    """
    settings = layer.shared.settings
    if settings.watchers or settings.attention_override or torch.is_grad_enabled():
        return False
    if layer.modality is not None or layer.packed:
        return False
    if decodes_in_place(settings.config, layer.ranks) is not None:
        return False
    mode = layer.known_mode(settings.config)
    if least is None and mode[0] == "sparse":
        mode = layer.early_mode(tokens, q.device, settings.config, "step")
    if mode[0] != "sparse":
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


def _newest_is_text(layer: HFLayer, mask: LazyMask, tokens: int) -> bool:
    """Whether the newest token is text in all rows, as a geometry expects; asked once a forward."""
    known, memo = layer.source.tracker.running.modality, mask.recipe.layouts
    tokens += mask.recipe.released
    if known is None or known.shape[1] < tokens:
        return True
    if _NEWEST not in memo:
        memo[_NEWEST] = bool((known[:, tokens - 1] == int(Modality.TEXT)).all())
    return memo[_NEWEST]


def _is_static(layer: HFLayer, k: Tensor) -> bool:
    held = _static_layer(layer)
    return held is not None and held.keys is k


def _static_layer(layer: HFLayer) -> Any:
    """What a static cache holds of the layer; None of other caches."""
    held = kv_cache.cache_layer(layer.source.tracker.running.cache, layer.index)
    return held if getattr(held, "is_compileable", False) else None


def _decoding(
    layer: HFLayer, q: Tensor, k: Tensor, mask: Any, options: AttentionOptions, tokens: int,
    recorded: LayerDecoding | None = None,
) -> LayerDecoding | None:  # fmt: skip
    """What the layer keeps of the keys; None where the cache does not hold them.

    Args:
        recorded: what a graph reads, to be written to if it has room.
    """
    config = layer.config_of_step()
    group = q.shape[1] // k.shape[1]
    blocks = (config.tile, config.unit, config.sinks, config.window, config.query_pools)

    def layout() -> TokenLayout:
        whole = layer.source.layout_of_call(layer.module, q, k, mask, options).layout
        first = slice(0, tokens)
        return TokenLayout(
            whole.modality[:, first], whole.segment[:, first], whole.document[:, first]
        )

    def new() -> DecodingGeometry:
        room = k.shape[2] if _is_static(layer, k) else max(k.shape[2], capacity_for(tokens))
        # Made to be written to in every mode of autograd.
        with torch.inference_mode(False), torch.no_grad():
            return DecodingGeometry(layout(), config, group, room)

    floors = tuple(config.floors().items())
    # Layers of a cache that has released keys hold different numbers of them.
    key = (blocks, floors, group, q.device, mask.recipe.released)
    wanted = kv_cache.Wanted(
        key, tokens, config, layer.ranks, mask.recipe, layout, new, q.shape[2] > 1, recorded
    )
    cache = layer.source.tracker.running.cache
    return kv_cache.decoding_for(cache, layer.index, k, wanted)

"""Hooks on a transformers model through which a cache sees queries, and gives layers their masks.

A cache is handed keys and values only. Where one wants the queries of a call, the attention module
gets, for this call, a config that names `observed_attention`: it calls what the module would have
called, and shows the cache the queries then. Hooks are there as long as a cache of the model is.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim
"""

from __future__ import annotations

import inspect
import weakref
from abc import abstractmethod
from contextvars import ContextVar
from copy import copy
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from mm_sparse.integrations.discovery import argument_of, note_parameters, parameters_of
from mm_sparse.integrations.forward_context import uncompiled
from mm_sparse.integrations.hf.attention import NAMES, dispatch, stock_function
from mm_sparse.integrations.hf.discovery import (
    UNSERVED,
    HFAttentionModule,
    find_layers,
    uses_attention_interface,
)

OBSERVED = "mm_sparse_observed"
# Modules that ask whether the name of their attention says "flash" must find the same answer.
OBSERVED_FLASH = "mm_sparse_observed_flash"
# What changes the result of a call and not which keys matter to a query.
SERVED = ("softcap", "s_aux")
# What forwards of attention modules call the cache.
CACHES = ("past_key_values", "layer_past", "past_key_value")
# Attribute of a config that was put in for a call: the name in the module's own.
_OWN_NAME = "_mm_sparse_own_name"


class ObservingCache(Cache):
    """A cache that is shown the calls of attention whose keys it holds."""

    @abstractmethod
    def serves(self, index: int | None) -> bool:
        """Whether calls of a layer of the decoder are shown to it."""

    @abstractmethod
    def wants_queries(self, index: int, queries: int) -> bool:
        """Whether it wants to see the queries of a layer's call with so many new tokens."""

    @abstractmethod
    def mask_of_layer(self, index: int, mask: Any, queries: int) -> Any:
        """The mask of a layer's call, made of the one that the model made for all."""

    @abstractmethod
    def note_ids(self, ids: Tensor) -> None:
        """Before a forward with these ids, (B, N)."""

    @abstractmethod
    def after_attention(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
    ) -> None:
        """After a call with q (B, H, N, D) on all keys k (B, K, M, D)."""


class Attachment:
    """Hooks on a model, which go when nobody holds this any more."""

    def __init__(self, model: nn.Module, modules: list[nn.Module], owners: list[Any]) -> None:
        handles: list[Any] = []
        for part in (*modules, *owners):
            note_parameters(type(part))
        for module in modules:
            handles.append(module.register_forward_pre_hook(_before, with_kwargs=True))
            handles.append(module.register_forward_hook(_after, always_call=True))
        handles += [o.register_forward_pre_hook(_note_ids, with_kwargs=True) for o in owners]
        weakref.finalize(self, _remove, handles)

    def __deepcopy__(self, memo: Any) -> Attachment:
        # Copies of a cache are for the same model.
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a SparseCache must be copied, not pickled: it belongs to a model")


_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachment]]
_ATTACHED = weakref.WeakKeyDictionary()


def attach(model: nn.Module) -> Attachment:
    """Let caches see the calls of a model; one attachment for all of them.

    Raises:
        ValueError: the model has no attention that can be observed.
    """
    known = _ATTACHED.get(model)
    found = None if known is None else known()
    if found is None:
        layers = observed_layers(model)
        _register()
        owners = list({id(o): o for layer in layers for o in layer.owners}.values())
        found = Attachment(model, [layer.module for layer in layers], owners)
        _ATTACHED[model] = weakref.ref(found)
    return found


def observed_layers(model: nn.Module) -> list[HFAttentionModule]:
    """Attention modules of the decoder, which keep keys in a cache.

    Raises:
        ValueError: there are none, one asks nobody what to call, or one biases its logits.
    """
    layers = [
        layer
        for layer in find_layers(model)
        if layer.modality is None and not layer.cross
        and isinstance(getattr(layer.module, "layer_idx", None), int)
    ]  # fmt: skip
    if not layers:
        raise ValueError(
            "model must be a transformers model whose decoder has attention layers with numbers, "
            f"got {type(model).__name__}"
        )
    served = [UNSERVED[name] for name in SERVED]
    for layer in layers:
        module = layer.module
        if layer.refusal and not any(reason in layer.refusal for reason in served):
            raise ValueError(
                f"model must have attention that goes by queries and keys alone, got {layer.name} "
                f"({type(module).__name__}): {layer.refusal}"
            )
        if not uses_attention_interface(type(module)) or "config" not in vars(module):
            raise ValueError(
                f"model must have attention that asks transformers' attention interface, got "
                f"{layer.name} ({type(module).__name__})"
            )
        if not {*CACHES, "kwargs"} & {*inspect.signature(type(module).forward).parameters}:
            raise ValueError(
                f"model must have attention whose forward takes `past_key_values`, got "
                f"{layer.name} ({type(module).__name__})"
            )
    return layers


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _register() -> None:
    from transformers import AttentionInterface

    for name in (OBSERVED, OBSERVED_FLASH):
        AttentionInterface.register(name, observed_attention)


class _Call:
    """A call of an attention module that a cache wants to see."""

    def __init__(self, module: nn.Module, cached: ObservingCache) -> None:
        self.module, self.cache = module, cached


_CALLS: ContextVar[tuple[_Call, ...]] = ContextVar("mm_sparse_observed_calls", default=())
_LOCK = Lock()
# Modules with a config that was put in: their own, and how many calls run.
_CHANGED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, int]] = weakref.WeakKeyDictionary()


def _with_argument(
    module: nn.Module, args: Any, kwargs: dict[str, Any], name: str, value: Any
) -> tuple[Any, dict[str, Any]]:
    names = parameters_of(module)
    at = names.index(name) if name in names else len(args)
    if name in kwargs or at >= len(args):
        return args, {**kwargs, name: value}
    return (*args[:at], value, *args[at + 1 :]), kwargs


def _cache_of(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    for name in CACHES:
        found = argument_of(module, args, kwargs, name)
        if found is not None:
            return found
    return None


def _before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of an attention module."""
    cached = _cache_of(module, args, kwargs)
    if not isinstance(cached, ObservingCache) or not cached.serves(module.layer_idx):  # pyright: ignore
        return None
    hidden = args[0] if args else argument_of(module, args, kwargs, "hidden_states")
    queries = hidden.shape[1]
    mask = argument_of(module, args, kwargs, "attention_mask")
    own = cached.mask_of_layer(module.layer_idx, mask, queries)  # pyright: ignore
    if cached.wants_queries(module.layer_idx, queries):  # pyright: ignore
        _observe(module, cached)
    if own is mask:
        return None
    return _with_argument(module, args, kwargs, "attention_mask", own)


@uncompiled
def _observe(module: nn.Module, cached: ObservingCache) -> None:
    with _LOCK:
        own, calls = _CHANGED.get(module, (module.config, 0))
        if calls == 0:
            config: Any = copy(own)
            name = own._attn_implementation
            setattr(config, _OWN_NAME, name)
            flash = "flash" in (name or "")
            config._attn_implementation_internal = OBSERVED_FLASH if flash else OBSERVED
            module.config = config
        _CHANGED[module] = own, calls + 1
    _CALLS.set((*_CALLS.get(), _Call(module, cached)))


def _after(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of an attention module, called after errors, too."""
    if torch.compiler.is_compiling():
        return
    calls = _CALLS.get()
    if not calls or calls[-1].module is not module:
        return
    _CALLS.set(calls[:-1])
    with _LOCK:
        own, running = _CHANGED.pop(module)
        if running > 1:
            _CHANGED[module] = own, running - 1
        else:
            module.config = own


def observed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What transformers calls for a module whose queries a cache wants to see."""
    name = getattr(module.config, _OWN_NAME)
    attend = dispatch if name in NAMES else stock_function(type(module), name or "eager")
    out = attend(module, query, key, value, attention_mask, **options)
    calls = _CALLS.get()
    if calls and calls[-1].module is module:
        calls[-1].cache.after_attention(module, query, key, value, attention_mask, options)
    return out


def _note_ids(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model."""
    if torch.compiler.is_compiling():
        return
    cached = argument_of(module, args, kwargs, "past_key_values")
    ids = argument_of(module, args, kwargs, "input_ids")
    if isinstance(cached, ObservingCache) and isinstance(ids, Tensor):
        cached.note_ids(ids)

"""The attention function that sparsified transformers models call, one object per layer.

B batch, H query heads, N query tokens, D head dim
"""

from __future__ import annotations

import sys
import warnings
from copy import copy
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mm_sparse.attention import (
    BREAK_EVEN,
    LayerDecoding,
    PackedBounds,
    dense_attention,
    dense_length,
    packed_attention,
)
from mm_sparse.integrations.discovery import defining_class, scorer_shape
from mm_sparse.integrations.forward_context import uncompiled
from mm_sparse.integrations.hf import kv_cache
from mm_sparse.integrations.hf.call_layout import HFLayoutSource, is_causal
from mm_sparse.integrations.hf.continuous_batching import refuse_continuous_batching
from mm_sparse.integrations.hf.decoding import (
    DENSE,
    NUMBER,
    prepare_steps,
    run_step,
    traced_step,
)
from mm_sparse.integrations.hf.discovery import (
    DISPATCH,
    UNSERVED,
    HFAttentionModule,
)
from mm_sparse.integrations.hf.lazy_mask import LazyMask, lazy_mask
from mm_sparse.integrations.hf.modality_tracker import ModalityTracker
from mm_sparse.integrations.hf.traced_attention import (
    broken_attention,
    number_of,
    serves,
    traced_attention,
)
from mm_sparse.integrations.hf.traced_mask import TracedMask, traced_mask
from mm_sparse.integrations.layer import LAYER, SparseLayer
from mm_sparse.integrations.options import AttentionOptions
from mm_sparse.integrations.shared_state import CHANGED, Shared
from mm_sparse.scorers import DescriptorCache

if TYPE_CHECKING:
    from mm_sparse.integrations.ulysses.head_part import HeadPart

NAME = "mm_sparse"
# transformers hands all sequences of a packed row over in one call if the name says "flash".
PACKED_NAME = "mm_sparse_flash"
NAMES = (NAME, PACKED_NAME)
# Attributes of modules: by device, tokens below which a call, or a step, is the model's own.
DENSE_CALLS, DENSE_STEPS = "_mm_sparse_dense_calls", "_mm_sparse_dense_steps"


class HFLayer(SparseLayer):
    """Serves an attention module of a transformers model."""

    source: HFLayoutSource

    def __init__(self, item: HFAttentionModule, shared: Shared, tracker: ModalityTracker) -> None:
        modality = item.modality
        encoder_decoder = getattr(item.root.config, "is_encoder_decoder", False)
        if encoder_decoder and modality is None and is_causal(item.module, AttentionOptions()):
            # The ids that the tracker sees are the encoder's; a decoder of this kind writes text.
            tracker = ModalityTracker(item.root)
        source = HFLayoutSource(tracker, modality, shared.plain, item.tower, item.packed)
        super().__init__(item, shared, source)
        # A module without a config goes by the model around it, which makes its masks.
        self._named = getattr(self.module, "config", None) or item.owners[-1].config
        named = getattr(self._named, "_attn_implementation", None) or "sdpa"
        # The config may be that of another sparsified model.
        self.original = "sdpa" if named in NAMES else named
        """The attention implementation that the layer had before."""
        self.packed = item.packed
        """Whether its calls are of rows of many images, windows or clips."""
        self.recorded: dict[Any, LayerDecoding] = {}
        """What steps in a graph read, by address and shape of the keys of a static cache."""
        self.forgotten: set[Any] = set()
        """Places of caches that are gone, of which a graph may have read."""
        self.number = number_of(self)
        """By which an operator in a graph finds the layer."""
        self._unserved: Any = None
        """Config, None without one, and hook of a module that keeps its own attention."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A process that unpickles the model may never have sparsified one.
        vars(self).update(state)
        # A copy is a layer of its own.
        self.number = number_of(self)
        register()

    @property
    def index(self) -> int | None:
        # Hybrid models number layers without keys and values of their own by -1.
        number = getattr(self.module, "layer_idx", None) if self.modality is None else None
        return None if number is None or number < 0 else number

    def attach(self) -> None:
        """Nothing for most: transformers asks `attention_forward`, which finds a module's layer.

        A module that cannot be served, in a model where others are, keeps its own name for its
        attention and gets its own masks: it may do more with them than attend.
        """
        self.head_split = self._tensor_parallel_part()
        self._tell_compiler()
        if self.refusal is None or getattr(self._named, "_attn_implementation", None) not in NAMES:
            return
        config = getattr(self.module, "config", None)
        self._unserved = (
            config,
            self.module.register_forward_pre_hook(self._give_own_mask, with_kwargs=True),
        )
        if config is not None:
            own: Any = copy(config)
            own._attn_implementation_internal = self.original
            self.module.config = own

    def _tensor_parallel_part(self) -> HeadPart | None:
        # Not at the top: few models are distributed, and importing that takes time.
        if not any(hasattr(p, "device_mesh") for p in self.module.parameters()):
            return None
        from mm_sparse.integrations.ulysses.head_part import tensor_parallel_part

        heads, kv_heads, _ = scorer_shape(self.module)
        return tensor_parallel_part(self.name, self.module, (heads, kv_heads))

    def _tell_compiler(self) -> None:
        """Note where the model's own SDPA answers, for calls inside a compiled graph."""
        tracker = self.source.tracker
        split = self.head_split is not None
        if self.original != "sdpa" or self.refusal is not None or split:
            tracker.traceable = tracker.servable = False
            return
        config = self.shared.base.config
        sparse = self.known_mode(config)[0] == "sparse"
        for kind, least in (("call", DENSE_CALLS), ("planned step", DENSE_STEPS)):
            lengths = {
                device: dense_length(config, torch.device(device), kind) if sparse else sys.maxsize
                for device in ("cpu", "cuda")
            }
            vars(self.module)[least] = lengths
            if kind == "call":
                for device, length in lengths.items():
                    known = tracker.dense_below.get(device, sys.maxsize)
                    tracker.dense_below[device] = min(known, length)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """A call as transformers makes it, outside of a graph."""
        return attention_forward(self.module, q, k, v, mask, **options)

    def split_heads(self, split: HeadPart | None) -> None:
        """Attend with the heads of a rank from here on; None: with all."""
        self.head_split = split
        if split is not None and self.standby is not None:
            # Of itself a layer attends to the tokens that it is given.
            self.standby.stay()
        for name in (DENSE_CALLS, DENSE_STEPS):
            vars(self.module).pop(name, None)
        self._tell_compiler()

    def detach(self) -> None:
        self.head_split = None
        for name in (NUMBER, DENSE_CALLS, DENSE_STEPS):
            vars(self.module).pop(name, None)
        if self._unserved is not None:
            config, handle = self._unserved
            handle.remove()
            if config is not None:
                self.module.config = config
            self._unserved = None

    def _give_own_mask(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Forward pre-hook of a module that is left as it was."""
        return tree_map_only(LazyMask, lambda m: m.recipe.original(self.original), (args, kwargs))

    def taken_away(self) -> str:
        """Who else decides what the module attends with, after `sparsify`; empty if nobody."""
        name = getattr(getattr(self.module, "config", None), "_attn_implementation", NAME)
        waiting = self.standby is not None and not self.standby.wrapped
        if self.refusal is not None or name in NAMES or (waiting and name == self.original):
            return ""
        return f"set_attn_implementation({name!r}) replaced it, sparsify again"

    def run_dense(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """A call as the model computes it by itself, with the arguments that transformers gives."""
        name = self.original
        if options.get("cu_seq_lens_q") is None or self.cross or "flash" in name:
            return run_original(self.module, name, q, k, v, mask, options)
        given = options_of(options)
        packed = self._bounds(given)
        if packed is not None and mask is None and not given.sliding_window:
            dropout = given.dropout if self.module.training else 0.0
            causal = is_causal(self.module, given)
            out = packed_attention(
                q, k, v, packed, causal=causal, scale=given.scale, dropout=dropout
            )
            return out, None
        if packed is not None:
            # The original functions would let packed sequences see each other.
            call_layout = self.source.layout_of_call(self.module, q, k, mask, given)
            out = dense_attention(
                q, k, v, layout=call_layout.layout, config=self.shared.config,
                query_offset=call_layout.first, scale=options.get("scaling"),
            )  # fmt: skip
            return out.transpose(1, 2).contiguous(), None
        return run_original(self.module, name, q, k, v, mask, options)

    def _bounds(self, options: AttentionOptions) -> PackedBounds | None:
        """The sequences of the packed row of a call; None where it is not packed."""
        if options.cu_seqlens is None or self.source.takes_bounds_of_text:
            return None
        return PackedBounds.of(options.cu_seqlens)

    def differs_in_mode(self, q: Tensor, options: AttentionOptions) -> bool:
        """Whether some sequences of a packed row are long enough to run sparse and others not."""
        if options.cu_seqlens is None:
            return False
        config = self.shared.config
        least = dense_length(config, q.device)
        packed = PackedBounds.of(options.cu_seqlens)
        return packed.shortest < least <= packed.longest and self.known_mode(config)[0] == "sparse"

    def _descriptors(self, k: Tensor) -> DescriptorCache | None:
        cache = self.source.tracker.running.cache
        return kv_cache.descriptors_for(cache, self.index, k, self.ranks)

    def _in_view(self, q: Tensor, k: Tensor, mask: Any, options: AttentionOptions) -> int | None:
        queries, keys = q.shape[2], k.shape[2]
        if self.packed and options.cu_seqlens is not None:
            return PackedBounds.of(options.cu_seqlens).longest
        if isinstance(mask, LazyMask):
            recipe = mask.recipe
            return None if recipe.is_cross else min(keys, recipe.first + queries)
        alone = mask is None and not is_causal(self.module, options)
        return None if alone and keys != queries else keys

    def problem(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: AttentionOptions
    ) -> str | None:
        if self.source.tracker.running.wants_weights:
            return "it is asked for the attention weights (`output_attentions`)"
        if mask is None and options.sliding_window and not is_causal(self.module, options):
            return "it came with a `sliding_window` to both sides and without a mask"
        if isinstance(mask, LazyMask):
            want, rows = (q.shape[2], k.shape[2]), mask.recipe.shape[0]
            if mask.recipe.shape[1:] != want or rows not in (1, q.shape[0]):
                return f"its mask is {mask.recipe.shape}, q and k are for {(q.shape[0], *want)}"
        return super().problem(q, k, v, mask, options)


def options_of(given: dict[str, Any]) -> AttentionOptions:
    """The keyword arguments with which transformers calls attention functions."""
    unsupported = None
    if not UNSERVED.keys().isdisjoint(given):
        named = [f"{UNSERVED[n]} (`{n}`)" for n in UNSERVED if given.get(n) is not None]
        unsupported = named[0] if named else None
    return AttentionOptions(
        scale=given.get("scaling"),
        is_causal=given.get("is_causal"),
        dropout=given.get("dropout") or 0.0,
        sliding_window=given.get("sliding_window"),
        cu_seqlens=given.get("cu_seq_lens_q"),
        unsupported=unsupported,
    )


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    *, by_heads: bool = False, **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What transformers calls under the name "mm_sparse": (B, N, H, D) and None.

    Args:
        by_heads: the call has all tokens, of a model whose ranks have some of them elsewhere.
    """
    layer = getattr(module, LAYER, None)
    if layer is None:
        _warn_of_dense(type(module))
        return run_original(module, "sdpa", query, key, value, attention_mask, options)
    if layer.head_split is not None and not by_heads:
        return layer.head_split.attend(
            attention_forward, module, query, key, value, attention_mask, options
        )
    alone = options.get("cu_seq_lens_q") is None
    if alone and layer.is_short(query.shape[2], key.shape[2], query.device):
        out = layer.run_dense(query, key, value, attention_mask, options)
        if layer.recorded and query.shape[2] < key.shape[2]:
            # Graphs go by what the prefill before has written down.
            prepare_steps(layer, query, key, value, attention_mask, options_of(options))
        return out
    given = options_of(options)
    if query.shape[2] == 1 and key.shape[2] > 1:
        step = run_step(layer, query, key, value, attention_mask, given)
        if step is not None:
            return step, None
    if layer.packed and layer.differs_in_mode(query, given):
        return _run_by_length(layer, query, key, value, given, options), None
    out, _ = layer.run(
        query, key, value, attention_mask, given,
        original=lambda: layer.run_dense(query, key, value, attention_mask, options),
        format_output=_with_no_weights,
    )  # fmt: skip
    if query.shape[2] < key.shape[2] or given.sliding_window:
        prepare_steps(layer, query, key, value, attention_mask, given)
    return out


def _run_by_length(
    layer: HFLayer, q: Tensor, k: Tensor, v: Tensor, given: AttentionOptions,
    options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """(1, N, H, D) of a packed row of which some sequences run sparse and others are too short."""
    least = dense_length(layer.shared.config, q.device)
    long, short, place = PackedBounds.of(given.cu_seqlens).split(least)  # pyright: ignore
    outs: list[Tensor] = []
    # Those that run sparse come last: theirs is the call that `report` shows.
    for tokens, bounds in (short, long):
        part = {**options, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        rows = [x[:, :, tokens] for x in (q, k, v)]
        out, _ = attention_forward(
            layer.module, rows[0], rows[1], rows[2], None, by_heads=True, **part
        )
        outs.insert(0, out)
    return torch.cat(outs, 1)[:, place]


@cache
def _warn_of_dense(cls: type) -> None:
    # The name was asked for, or came with the config object of a sparsified model.
    warnings.warn(
        f'{cls.__name__} has attention implementation "{NAME}" and was not sparsified: it runs '
        "dense; call `mms.sparsify(model)`",
        stacklevel=3,
    )


def _with_no_weights(out: Tensor) -> tuple[Tensor, None]:
    return out, None


def run_original(
    module: nn.Module, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Any,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The call as the model makes it without us, with the mask that it makes then."""
    if any(options.get(n) is not None for n in ("softcap", "s_aux", "head_mask")):
        name = "eager"  # SDPA would leave them out in silence
    if isinstance(mask, LazyMask):
        recipe, mask = mask.recipe, mask.recipe.original(name)
        if mask is None and options.get("is_causal") is False:
            # Some modules say so because they were given a mask, where they would have got none.
            options = {**options, "is_causal": q.shape[2] > 1 and recipe.skips_causal}
    elif name == "eager" and isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    return stock_function(type(module), name)(module, q, k, v, mask, **options)


@cache
def stock_function(cls: type, name: str) -> Any:
    """What a class of modules calls under the name of an attention implementation."""
    from transformers import AttentionInterface

    home = vars(import_module(defining_class(cls).__module__))
    eager = home.get("eager_attention_forward")
    if name == "eager" and eager is not None:
        return eager
    interface = home.get(DISPATCH) or AttentionInterface()
    return interface["sdpa" if name == "eager" else name]


_uncompiled_attention = uncompiled(attention_forward)
_uncompiled_mask = uncompiled(lazy_mask)


def dispatch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`attention_forward`, of which steps of decoding and dense calls stay in a compiled graph."""
    if torch.compiler.is_compiling():
        step = query.shape[2] == 1
        if step and type(attention_mask) is LazyMask and attention_mask.stock is not None:
            # A recipe would make a graph of its own for steps that differ in a number.
            attention_mask = attention_mask.stock
        number = getattr(module, NUMBER, None) if step else None
        if number is not None and number != DENSE and attention_mask is not None:
            scale = options.get("scaling")
            return traced_step(module, query, key, value, attention_mask, scale), None
        least: dict[str, int] = getattr(module, DENSE_STEPS if step else DENSE_CALLS, {})
        known = not CHANGED[0] and key.shape[2] < least.get(query.device.type, 0)
        own = attention_mask
        if type(own) is TracedMask and own.has_stock:
            own = own.stock
        stock = own is None or type(own) is Tensor
        if (known or number == DENSE) and stock and _plain(options):
            return _sdpa(module, query, key, value, own, **options)
        if not (step or CHANGED[0]) and serves(module, attention_mask, options):
            return traced_attention(module, query, key, value, attention_mask, options), None
        if isinstance(attention_mask, LazyMask) and not CHANGED[0]:
            return broken_attention(
                attention_forward, module, query, key, value, attention_mask, options
            )
    if type(attention_mask) is TracedMask:
        return broken_attention(
            attention_forward, module, query, key, value, attention_mask, options
        )
    return _uncompiled_attention(module, query, key, value, attention_mask, **options)


def mask_or_lazy(**arguments: Any) -> Any:
    """`lazy_mask`; inside a compiled graph a `TracedMask`, or for SDPA its own."""
    if torch.compiler.is_compiling():
        from transformers.masking_utils import sdpa_mask

        queries, keys = arguments.get("q_length"), arguments.get("kv_length", 0)
        if queries == 1:
            skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            return sdpa_mask(**{**arguments, **skips})  # pyright: ignore
        device = torch.device(arguments.get("device", "cpu")).type
        simple = queries == keys and not CHANGED[0] and not arguments.get("use_vmap")
        if not CHANGED[0]:
            short = simple and keys < BREAK_EVEN["call"].get(device, 0)
            return traced_mask(arguments, stock=short)
    return _uncompiled_mask(**arguments)


def _plain(options: dict[str, Any]) -> bool:
    """Whether SDPA honours all that a call comes with."""
    return all(options.get(name) is None for name in (*UNSERVED, "cu_seq_lens_q"))


def _sdpa(module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, *args, **options)


def register() -> None:
    """Make transformers know the name "mm_sparse"; again is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in NAMES:
        AttentionInterface.register(name, dispatch)
        AttentionMaskInterface.register(name, mask_or_lazy)
    refuse_continuous_batching()

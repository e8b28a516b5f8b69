"""A KV cache of a transformers model that keeps what matters and releases the rest.

B batch, H query heads, K KV heads, N new tokens, M keys that are held, D head dim
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from mm_sparse.integrations.hf.kv_cache import HELD
from mm_sparse.integrations.hf.modality_tracker import CARRIED, special_tokens
from mm_sparse.integrations.layer import scale_of
from mm_sparse.integrations.sparse_cache.budget import CacheBudget
from mm_sparse.integrations.sparse_cache.cache_report import CacheReport, layer_row
from mm_sparse.integrations.sparse_cache.fixed_layer import FixedSparseCacheLayer
from mm_sparse.integrations.sparse_cache.key_choice import choose_keys
from mm_sparse.integrations.sparse_cache.key_relevance import by_unit, key_mass, worth_of_mass
from mm_sparse.integrations.sparse_cache.layers import SparseCacheLayer
from mm_sparse.integrations.sparse_cache.masks import fitted, newest_visible, valid_keys
from mm_sparse.integrations.sparse_cache.observation import ObservingCache, attach
from mm_sparse.integrations.sparse_cache.step_masks import StepMasks
from mm_sparse.modality import Modality


class SparseCache(ObservingCache):
    """Keys and values of a prompt, of which each layer keeps the most relevant.

    As soon as a layer has attended in the prefill, each of its KV heads keeps the keys that matter
    most to the last `window` queries, and the first `sinks` and last `window` keys. Tensors of the
    rest are freed, so that not even the prefill holds the keys of more than one layer whole.
    Positions stay true, new tokens are appended, and attention runs on what is left, dense or, in
    a sparsified model, sparse.

    Every forward with at least `window` (and two) new tokens releases keys, down to the budget of
    the tokens so far: a prompt can be prefilled in chunks (`generate(prefill_chunk_size=...)`), and
    a conversation goes on. Shorter ones, as steps of decoding are, release nothing.

    The worth of a key is the exact attention mass that the last queries give it, as in SnapKV
    (arXiv 2404.14469), the mean over the query heads of its KV head.

    Args:
        model: a decoder of transformers, sparsified or not. It has hooks as long as the cache
            lives; nothing else of it changes.
        keep: share of the keys so far, in (0, 1], one number or one for each layer of the decoder
            (`mms.spread_keep` measures them). Layers with a sliding window keep what they have.
        tokens: number of keys to keep, instead of a share.
        sinks, window: keys that are always kept, the first and the newest of a row.
        near: a key is worth as much as the best of so many neighbours if that ranks it higher; odd,
            1 for none. Not with `unit`.
        unit: keep or release units of so many keys as a whole; None for single keys.
        shares: by modality, the share of the budget that is its own.
        floors: by modality, the least share of its own keys that stays, beyond the budget if need
            be.
        max_new_tokens: give layers room for so many tokens behind a prefill, at an address of their
            own, so that steps of decoding are compiled and captured as one CUDA graph, as those of
            a `StaticCache` are; `generate` does so on a GPU. With SDPA or eager attention, or
            sparsified.
    Raises:
        ValueError: an argument is out of range, or the model cannot be served: encoder-decoders,
            layers that share keys, decoders without full attention.

    Padding must be on the left. Refused by name: `crop` of tokens that are released in some heads,
    masks of flex_attention, pickling.

    Example:
        >>> cache = mms.SparseCache(model, keep=0.4)
        >>> out = model.generate(**inputs, past_key_values=cache, max_new_tokens=200)
        >>> print(cache.report())
    """

    def __init__(
        self, model: nn.Module, keep: float | Sequence[float] = 0.4, *,
        tokens: int | None = None, sinks: int = 4, window: int = 128, near: int = 15,
        unit: int | None = None, shares: Mapping[Modality, float] | None = None,
        floors: Mapping[Modality, float] | None = None, max_new_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self.budget = CacheBudget(
            keep, tokens, sinks, window, near, unit, shares or {}, floors or {}
        )
        config = _decoder_config(model)
        layers = DynamicCache(config=config).layers
        self.budget.check_layers(len(layers))
        served = [type(layer) is DynamicLayer for layer in layers]
        if not any(served):
            raise ValueError(
                f"model must have layers with full attention, got {type(model).__name__} with "
                f"{sorted({type(layer).__name__ for layer in layers})}"
            )
        if max_new_tokens is not None:
            _check_room(max_new_tokens, model, served)
        super().__init__(
            layers=[
                self._new_layer(max_new_tokens) if own else layer
                for layer, own in zip(layers, served, strict=True)
            ]
        )
        self.max_new_tokens = max_new_tokens
        self._step_masks = StepMasks()
        self._kinds_of_ids = special_tokens(model.config)
        self._modality: Tensor | None = None
        self._checked: tuple[Any, Tensor | None] = (None, None)
        self._attachment = attach(model)

    def _new_layer(self, room: int | None) -> SparseCacheLayer:
        if room is None:
            return SparseCacheLayer()
        # The last chunk of a prompt may be too short to be a prefill.
        return FixedSparseCacheLayer(room + self._prefill, self._prefill)

    @property
    def _prefill(self) -> int:
        """New tokens from which on a forward is a prefill."""
        return max(2, self.budget.window)

    @property
    def is_compileable(self) -> bool:
        """Whether steps are compiled: `max_new_tokens` was given."""
        return self.max_new_tokens is not None

    @property
    def modality(self) -> Tensor | None:
        """(B, tokens so far) int8, what each is; None where all are text."""
        carried = getattr(self, CARRIED, None)
        return self._modality if carried is None else carried

    def report(self) -> CacheReport:
        """What each layer and modality holds, and how much memory that and the rest is."""
        return CacheReport(tuple(layer_row(i, x, self.modality) for i, x in enumerate(self.layers)))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if not self.serves(layer_idx):
            return super().get_mask_sizes(query_length, layer_idx)
        # One mask for all of them: that of the largest holds those of the others.
        sizes = [
            x.get_mask_sizes(query_length) for x in self.layers if isinstance(x, SparseCacheLayer)
        ]
        return max(sizes)

    def reset(self) -> None:
        super().reset()
        self._modality = None
        vars(self).pop(CARRIED, None)

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._change_modality(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change_modality(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change_modality(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        seen = int(self.get_seq_length())
        self._change_modality(lambda x: x[:, :seen])

    def _change_modality(self, change: Any) -> None:
        if self._modality is not None:
            self._modality = change(self._modality)

    def serves(self, index: int | None) -> bool:
        known = index is not None and 0 <= index < len(self.layers)
        return known and isinstance(self.layers[index], SparseCacheLayer)  # pyright: ignore

    def wants_queries(self, index: int, queries: int) -> bool:
        if queries >= self._prefill:
            return True
        # A prompt that is shorter needs room for what comes, too.
        layer = self.layers[index]
        return isinstance(layer, FixedSparseCacheLayer) and not layer.fixed

    def mask_of_layer(self, index: int, mask: Any, queries: int) -> Any:
        layer: Any = self.layers[index]
        whole = isinstance(mask, Tensor) and mask.dim() == 4
        if layer.is_compileable and queries < self._prefill and not whole:
            raise ValueError(
                "max_new_tokens needs attention that is given the mask of a static cache: "
                '"sdpa" or "eager", or a sparsified model'
            )
        return fitted(mask, *layer.get_mask_sizes(queries))

    def note_ids(self, ids: Tensor) -> None:
        if not self._kinds_of_ids:
            return
        known, past = self._modality, int(self.get_seq_length())
        if known is not None and known.shape[1] > past:
            # A model around this one has noted them.
            return
        kinds = torch.zeros_like(ids, dtype=torch.int8)
        for token, kind in self._kinds_of_ids.items():
            kinds.masked_fill_(ids == token, int(kind))
        if known is None:
            known = kinds.new_zeros(len(kinds), past)
        self._modality = torch.cat([known, kinds], 1)

    @torch.no_grad()
    def after_attention(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
    ) -> None:
        index, layer = self._layer_of(module)
        held = layer.keys.shape
        # Latent attention makes keys of many heads of what the cache holds for one.
        if (k.shape[0], k.shape[2]) != (held[0], held[2]) or k.shape[1] % held[1]:
            raise ValueError(
                f"layer {index} ({type(module).__name__}) must attend with the keys that the cache "
                f"gave it, {tuple(held)}, got {tuple(k.shape)}"
            )
        count = min(self.budget.keys(index, layer.seen), layer.held)
        valid = None
        if count < layer.held:
            valid, mass = self._mass(layer, q, k, mask, options)
            places = self._places(layer, valid, mass, count)
            if places.shape[-1] < layer.held:
                layer.release(places, self.budget.window)
                # What a sparsified layer knew of the keys that are gone.
                vars(layer).pop(HELD, None)
                valid = valid[:, None].expand(-1, places.shape[1], -1).gather(-1, places)[:, 0]
        if isinstance(layer, FixedSparseCacheLayer):
            if valid is None:
                window = min(self._prefill, q.shape[2])
                valid = self._valid(mask, newest_visible(mask, layer.held, window, q.device))
            layer.fix()
            if all(not self.serves(i) for i in range(index)):
                # The first layer of another prefill, whose padding may be another.
                self._step_masks = StepMasks()
            self._step_masks.prepare(module, layer, q, valid.expand(len(q), -1), options)

    def _places(self, layer: SparseCacheLayer, valid: Tensor, mass: Tensor, count: int) -> Tensor:
        """(B, K, at least `count`), what stays."""
        worth, kinds, totals = self._worth_of(layer, valid, mass)
        return choose_keys(worth, valid, kinds, totals, count, self.budget)

    def _layer_of(self, module: nn.Module) -> tuple[int, SparseCacheLayer]:
        """Number and layer of the keys of an attention module."""
        index: int = module.layer_idx  # pyright: ignore
        return index, self.layers[index]  # pyright: ignore

    def _worth_of(
        self, layer: SparseCacheLayer, valid: Tensor, mass: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`worth` of a layer's keys, their modalities, and how many of each a row has had."""
        position = layer.true_positions().long()
        kinds, totals = self._kinds(position, valid, layer.seen)
        return self.worth(layer, mass, position, kinds), kinds, totals

    def worth(
        self, layer: SparseCacheLayer, mass: Tensor, position: Tensor, kinds: Tensor
    ) -> Tensor:
        """(B, K, M), what keys are ranked by; a class of your own may rank by something else.

        Args:
            layer: holds the keys and values, (B, K, M, D).
            mass: (B, K, M), attention mass that the newest queries give each key.
            position: (B, K, M), where keys stand in the sequence.
            kinds: (B, K, M), modalities.
        """
        unit = self.budget.unit
        if unit is not None:
            return by_unit(mass, position, kinds, unit)
        return worth_of_mass(mass, self.budget.near)

    def _mass(
        self, layer: SparseCacheLayer, q: Tensor, k: Tensor, mask: Any, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """(B, M) bool and (B, K, M): which keys are no padding, and their attention mass."""
        window = min(self.budget.window, q.shape[2])
        visible = newest_visible(mask, layer.held, window, q.device)
        valid = self._valid(mask, visible)
        visible = visible & valid[:, None] & valid[:, -window:, None]
        newest, scale = q[:, :, -window:], scale_of(q, options.get("scaling"))
        mass = key_mass(newest, k, visible, scale, options.get("softcap"))
        mass = mass.unflatten(1, (layer.keys.shape[1], -1)).mean(2)
        return valid.expand(len(q), -1), mass

    def _valid(self, mask: Any, visible: Tensor) -> Tensor:
        """`valid_keys`, asked once of a mask that layers share: the answer waits for the device."""
        if mask is None:
            return visible[:, -1]
        known, valid = self._checked
        if valid is None or known is None or known() is not mask:
            valid = valid_keys(visible)
            self._checked = weakref.ref(mask), valid
        return valid

    def _kinds(self, position: Tensor, valid: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        """(B, K, M) int8 and (B, modalities): kinds of keys, and how many tokens were of each."""
        batch, heads, keys = position.shape
        known = self.modality
        if known is None or known.shape[1] < seen:
            if self._kinds_of_ids and (self.budget.shares or self.budget.floors):
                raise ValueError(
                    f"shares and floors need the modality of {seen} tokens, and the model was "
                    "given no input_ids: sparsify it and say it with `mms.set_modality`"
                )
            known = torch.zeros(batch, seen, dtype=torch.int8, device=position.device)
        known = known[:, :seen].to(position.device)
        if len(known) != batch:
            raise ValueError(f"input_ids must have {batch} rows as keys have, got {len(known)}")
        kinds = known[:, None].expand(-1, heads, -1).gather(-1, position)
        # Padding comes first, and sinks stay: the first key of a row tells how much there was.
        first = position[:, 0].gather(1, (keys - valid.sum(-1, keepdim=True)).clamp(max=keys - 1))
        real = torch.arange(seen, device=position.device) >= first
        totals = torch.stack([((known == int(m)) & real).sum(1) for m in Modality], 1)
        return kinds, totals


def _check_room(room: int, model: nn.Module, served: list[bool]) -> None:
    if isinstance(room, bool) or not isinstance(room, int) or room < 1:
        raise ValueError(f"max_new_tokens must be a positive int or None, got {room!r}")
    if not all(served):
        raise ValueError(
            f"max_new_tokens needs full attention in all layers, got {type(model).__name__} with "
            f"{served.count(False)} layers of another kind"
        )


def _decoder_config(model: Any) -> Any:
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model must be a decoder, got {name}, which has an encoder")
    decoder = config.get_text_config(decoder=True)  # pyright: ignore
    if getattr(decoder, "num_kv_shared_layers", None):
        raise ValueError(
            f"model must have keys of its own in every layer, got {name}, of which "
            f"{decoder.num_kv_shared_layers} layers share those of others"
        )
    return config

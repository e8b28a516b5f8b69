"""Which positions of a sequence are image or audio, in a prefill and while tokens are generated.

B batch, N new tokens, M tokens so far
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mm_sparse.integrations.hf import kv_cache
from mm_sparse.modality import Modality

# A cache carries the modality of what is in it: copies and several sequences at once stay right.
CARRIED = "_mm_sparse_modality"
_NAMES = {
    "image_token_id": Modality.IMAGE,
    "image_token_index": Modality.IMAGE,
    "video_token_id": Modality.IMAGE,
    "video_token_index": Modality.IMAGE,
    "audio_token_id": Modality.AUDIO,
    "audio_token_index": Modality.AUDIO,
}


def special_tokens(config: Any) -> dict[int, Modality]:
    """Placeholder ids of a model's config and of the configs in it."""
    tokens: dict[int, Modality] = {}
    for part in [getattr(config, n, None) for n in getattr(config, "sub_configs", ())]:
        if part is not None:
            tokens |= special_tokens(part)
    for name, kind in _NAMES.items():
        value = getattr(config, name, None)
        if isinstance(value, int):
            tokens[value] = kind
    return tokens


class ModalityTracker:
    """Hooks on a model that know the modality of every position of the running forward."""

    def __init__(self, root: Any) -> None:
        self.name = type(root).__name__
        self.tokens = special_tokens(root.config)
        self.current: Tensor | None = None
        """(B, M) int8 while a forward runs that knows it."""
        self.given: Tensor | None = None
        """What the caller said instead."""
        self.cache: Any = None
        """The KV cache that the running forward was given."""
        self._models: list[nn.Module] = []
        self._parameters: dict[type, list[str]] = {}
        self._depth = 0
        self._from_ids = False

    def follow(self, models: Iterable[nn.Module]) -> None:
        """Also know what goes on when these, inside the root or itself, are called alone."""
        for model in models:
            if all(model is not other for other in self._models):
                self._models.append(model)
                names = list(inspect.signature(type(model).forward).parameters)[1:]
                self._parameters[type(model)] = names

    def attach(self) -> list[Any]:
        """Set the hooks; returns their handles."""
        handles: list[Any] = []
        for model in self._models:
            handles.append(model.register_forward_pre_hook(self.before, with_kwargs=True))
            handles.append(
                model.register_forward_hook(self.after, with_kwargs=True, always_call=True)
            )
        return handles

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        self._depth += 1
        if self._depth == 1:
            self.current, self.cache, self._from_ids = None, None, False
        if self.cache is None:
            self.cache = self._argument(module, args, kwargs, "past_key_values")
            kv_cache.check_unchanged(self.cache)
        if not self.tokens and self.given is None:
            return
        ids = self._argument(module, args, kwargs, "input_ids")
        embeds = self._argument(module, args, kwargs, "inputs_embeds")
        if self._from_ids or (ids is None and (embeds is None or self.current is not None)):
            return
        cached = self._argument(module, args, kwargs, "past_key_values")
        past = int(cached.get_seq_length()) if hasattr(cached, "get_seq_length") else 0
        self._from_ids = ids is not None
        fresh = self._look_up(ids, embeds)
        if self.given is not None:
            known = self.given.to(fresh.device, torch.int8)
            known = self._match_rows(known, len(fresh))[:, past : past + fresh.shape[1]]
            fresh = torch.cat([known, fresh[:, known.shape[1] :]], 1)
        if past:
            fresh = torch.cat([self._past(cached, past, fresh), fresh], 1)
        self.current = fresh
        if cached is not None:
            setattr(cached, CARRIED, fresh)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook: a cache that the model made itself carries the modality from here on."""
        self._depth = max(self._depth - 1, 0)
        if self._depth:
            return
        cached = getattr(output, "past_key_values", None)
        if cached is not None and self.current is not None:
            setattr(cached, CARRIED, self.current)
        self.current = self.cache = None

    def _argument(self, module: nn.Module, args: Any, kwargs: dict[str, Any], name: str) -> Any:
        if name in kwargs:
            return kwargs[name]
        names = self._parameters[type(module)]
        at = names.index(name) if name in names else len(args)
        return args[at] if at < len(args) else None

    def _look_up(self, ids: Tensor | None, embeds: Any) -> Tensor:
        if ids is None:
            return embeds.new_zeros(embeds.shape[:2], dtype=torch.int8)
        kinds = torch.zeros_like(ids, dtype=torch.int8)
        for token, kind in self.tokens.items():
            kinds.masked_fill_(ids == token, int(kind))
        return kinds

    def _past(self, cached: Any, past: int, fresh: Tensor) -> Tensor:
        before = getattr(cached, CARRIED, None)
        if self.given is not None and self.given.shape[1] >= past:
            before = self.given
        if before is None or before.shape[1] < past:
            raise ValueError(
                f"past_key_values must come from a call of the sparsified {self.name}, or the "
                f"modality of its {past} tokens must be given with `mms.set_modality`: got "
                f"{'nothing' if before is None else before.shape[1]} for them"
            )
        before = before[:, :past].to(fresh.device, torch.int8)
        return self._match_rows(before, len(fresh))

    def _match_rows(self, known: Tensor, rows: int) -> Tensor:
        if len(known) == rows:
            return known
        if not len(known) or rows % len(known):
            raise ValueError(
                f"modality must have one row per row of the {rows} in the batch, or one for each "
                f"group of copies, got {len(known)} in {self.name}"
            )
        return known.repeat_interleave(rows // len(known), 0)

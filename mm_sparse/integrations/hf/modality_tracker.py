"""Which positions are image, audio or video, in a prefill and while tokens are generated.

B batch, N new tokens, M tokens so far
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mm_sparse.integrations.discovery import argument_of, note_parameters
from mm_sparse.integrations.forward_context import (
    ForwardMemory,
    assign,
    current,
    is_exporting,
    refuse_export,
    uncompiled,
)
from mm_sparse.integrations.hf import kv_cache
from mm_sparse.integrations.hf.video_frames import GRIDS, first_of_frames, merge_size
from mm_sparse.integrations.shared_state import CHANGED
from mm_sparse.integrations.standby.standby import Standby
from mm_sparse.modality import Modality

# A cache carries the modality of what is in it: copies and several sequences at once stay right.
CARRIED = "_mm_sparse_modality"
CARRIED_FRAMES = "_mm_sparse_frames"
TYPES = "mm_token_type_ids"
"""Argument in which processors of transformers say what stands for an image (1) and a video (2)."""
ENTERED = "_mm_sparse_entered"
"""Attribute of a model whose forward runs, where the hooks of the forward are in no graph."""
# An id that a config gives to both is that of images, which come last.
_NAMES = {
    "video_token_id": Modality.VIDEO,
    "video_token_index": Modality.VIDEO,
    "image_token_id": Modality.IMAGE,
    "image_token_index": Modality.IMAGE,
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


@dataclass(frozen=True)
class RunningForward:
    """What is known of the forward that runs now."""

    modality: Tensor | None = None
    """(B, M) int8, of all tokens so far; None if nothing tells."""
    frames: Tensor | None = None
    """(B, M) bool, the first token of every frame of a video; None where no grid tells."""
    given: Tensor | None = None
    """What the caller said instead."""
    cache: Any = None
    """The KV cache that the forward was given."""
    depth: int = 0
    """Models that are entered: the root and others inside it."""
    from_ids: bool = False
    """Whether `modality` is known of ids."""
    bounds: Any = None
    """Bounds of the texts of packed rows, as they were given to the whole model."""
    wants_weights: bool = False
    """Whether attention weights are asked for."""
    outer: RunningForward | None = None
    """The forward of the same model around this one."""

    def when_recomputed(self) -> RunningForward:
        """What a block knows that a checkpoint computes again."""
        return replace(self, cache=None, depth=0, outer=None)


NO_FORWARD = RunningForward()


def _is_static(cached: Any) -> bool:
    return bool(getattr(cached, "is_compileable", False))


def _tokens_of(args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """What a forward was given: ids (B, N) or embeddings (B, N, width)."""
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None and args:
        tokens = args[0]
    return tokens if isinstance(tokens, Tensor) and tokens.dim() > 1 else None


class ModalityTracker:
    """Hooks on a model that know the modality of every position of the running forward."""

    def __init__(self, root: Any) -> None:
        self.root, self.name = root, type(root).__name__
        self.tokens = special_tokens(root.config)
        self.merge = merge_size(root.config)
        self.memory: ForwardMemory | None = None
        """Finds the modality again where a checkpoint computes blocks again."""
        self.dense_below: dict[str, int] = {}
        """By device, tokens below which all layers are the model's own SDPA."""
        self.traceable = True
        """Whether all layers have SDPA for their own attention."""
        self.servable = True
        """Whether all layers can be operators of a graph."""
        self.entered = False
        """Whether a forward runs whose hooks are in no graph."""
        self._waiting: list[Standby] = []
        """Of layers of the decoder that no forward so far was too long for."""
        self._models: list[nn.Module] = []
        self._warned = False

    @property
    def running(self) -> RunningForward:
        """What is known of the forward that runs now, in this thread."""
        return current(self, NO_FORWARD)

    def follow(self, models: Iterable[nn.Module]) -> None:
        """Also know what goes on when these, inside the root or itself, are called alone."""
        for model in models:
            if all(model is not other for other in self._models):
                self._models.append(model)
                note_parameters(type(model))

    def watch(self, standby: Standby, module: nn.Module) -> None:
        """Tell layers, of which `module` is one, of the lengths of forwards."""
        inside = any(part is module for part in self.root.modules())
        if inside and all(standby is not known for known in self._waiting):
            self._waiting.append(standby)

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
        if self._waiting:
            self._tell_length(module, args, kwargs)
        if not (self._needs_nothing(args, kwargs) or self._stays_in_graph(module, args, kwargs)):
            self._before(module, args, kwargs)

    def _tell_length(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Have layers wrapped that a forward may make run sparse."""
        tokens = _tokens_of(args, kwargs)
        length = 0 if tokens is None else tokens.shape[1]
        cached = argument_of(module, args, kwargs, "past_key_values")
        if hasattr(cached, "get_seq_length") and not torch.compiler.is_compiling():
            length += int(cached.get_seq_length())
        # The model's own attention goes past the bounds of packed texts.
        packed = argument_of(module, args, kwargs, "cu_seq_lens_q") is not None
        if packed or length >= min(standby.least for standby in self._waiting):
            self._wake(None if packed else length)

    @uncompiled
    def _wake(self, tokens: int | None) -> None:
        for standby in self._waiting:
            standby.see(tokens)

    def _stays_in_graph(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether a forward in a compiled graph has nothing to tell its layers beside their masks.

        It is that of a text model, or of a part of a model whose forward is known already.
        """
        if not torch.compiler.is_compiling() or is_exporting() or CHANGED[0] or not self.servable:
            return False
        if self.entered:
            return True
        if self.tokens or argument_of(module, args, kwargs, "cu_seq_lens_q") is not None:
            return False
        weights = argument_of(module, args, kwargs, "output_attentions")
        if weights is None:
            weights = getattr(getattr(module, "config", None), "output_attentions", False)
        if weights:
            return False
        kv_cache.forget_asked(argument_of(module, args, kwargs, "past_key_values"))
        return True

    def _needs_nothing(self, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether a forward in a compiled graph is a step, whose token is text, or all dense."""
        if not torch.compiler.is_compiling():
            return False
        tokens = _tokens_of(args, kwargs)
        if tokens is None:
            return False
        if tokens.shape[1] == 1:
            return True
        if (
            CHANGED[0]
            or self.tokens
            or not self.traceable
            or kwargs.get("past_key_values") is not None
        ):
            return False
        return tokens.shape[1] < self.dense_below.get(tokens.device.type, 0)

    @uncompiled
    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        refuse_export()
        running = self.running
        if running.depth == 0 or module is self.root:
            outer = running if running.depth else None
            running = RunningForward(given=running.given, outer=outer)
        running = replace(running, depth=running.depth + 1)
        # Before anything can fail: `after` is called for this forward in any case.
        assign(self, running)
        self.entered = vars(module)[ENTERED] = True
        if running.cache is None:
            cache = argument_of(module, args, kwargs, "past_key_values")
            kv_cache.check_unchanged(cache)
            running = replace(running, cache=cache)
        bounds = argument_of(module, args, kwargs, "cu_seq_lens_q")
        weights = argument_of(module, args, kwargs, "output_attentions")
        if weights is None:
            weights = getattr(getattr(module, "config", None), "output_attentions", False)
        running = replace(
            running,
            bounds=running.bounds if bounds is None else bounds,
            wants_weights=running.wants_weights or bool(weights),
        )
        assign(self, self._with_modality(running, module, args, kwargs))
        knows = self.tokens or running.given is not None
        if knows and self.memory is not None and torch.is_grad_enabled():
            self.memory.attach()

    def _with_modality(
        self, running: RunningForward, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> RunningForward:
        ids = argument_of(module, args, kwargs, "input_ids")
        embeds = argument_of(module, args, kwargs, "inputs_embeds")
        if not self.tokens and running.given is None:
            if ids is None and embeds is not None and running.depth == 1:
                self.warn_of_text(f"{self.name} was given inputs_embeds")
            return running
        known = running.modality is not None
        if running.from_ids or (ids is None and (embeds is None or known)):
            return running
        cached = argument_of(module, args, kwargs, "past_key_values")
        past = int(cached.get_seq_length()) if hasattr(cached, "get_seq_length") else 0
        if ids is None and running.given is None and not past:
            self.warn_of_text(f"{self.name} was given inputs_embeds and no input_ids")
        fresh = self._look_up(ids, embeds)
        # Some models write frames of a video with the placeholder of images.
        types = argument_of(module, args, kwargs, TYPES)
        if isinstance(types, Tensor) and types.shape == fresh.shape:
            framed = (types.to(fresh.device) == 2) & (fresh == int(Modality.IMAGE))
            fresh.masked_fill_(framed, int(Modality.VIDEO))
        if running.given is not None:
            given = running.given.to(fresh.device, torch.int8)
            given = self._match_rows(given, len(fresh))[:, past : past + fresh.shape[1]]
            fresh = torch.cat([given, fresh[:, given.shape[1] :]], 1)
        frames = first_of_frames(fresh, argument_of(module, args, kwargs, GRIDS), self.merge)
        if past:
            frames = self._with_past_frames(frames, cached, past, fresh)
            fresh = torch.cat([self._past(running.given, cached, past, fresh), fresh], 1)
        if cached is not None:
            _carry(cached, fresh, frames)
        return replace(running, modality=fresh, frames=frames, from_ids=ids is not None)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook: a cache that the model made itself carries the modality from here on."""
        compiling = torch.compiler.is_compiling() and not is_exporting()
        if getattr(module, ENTERED, False) or not compiling:
            self._after(module, output)

    @uncompiled
    def _after(self, module: nn.Module, output: Any) -> None:
        running = self.running
        vars(module).pop(ENTERED, None)
        self.entered = running.depth > 1 or running.outer is not None
        if running.depth > 1:
            assign(self, replace(running, depth=running.depth - 1))
            return
        cached = getattr(output, "past_key_values", None)
        if cached is not None and running.modality is not None:
            _carry(cached, running.modality, running.frames)
        given = None if running.given is None else RunningForward(given=running.given)
        assign(self, given if running.outer is None else running.outer)

    def warn_of_text(self, why: str) -> None:
        """Say once that tokens of which nothing is known count as text."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{why}: what is not known to be image, audio or video counts as text; say what "
                "the tokens are with `mms.set_modality`",
                stacklevel=2,
            )

    def _look_up(self, ids: Tensor | None, embeds: Any) -> Tensor:
        if ids is None:
            return embeds.new_zeros(embeds.shape[:2], dtype=torch.int8)
        kinds = torch.zeros_like(ids, dtype=torch.int8)
        for token, kind in self.tokens.items():
            kinds.masked_fill_(ids == token, int(kind))
        return kinds

    def _past(self, given: Tensor | None, cached: Any, past: int, fresh: Tensor) -> Tensor:
        before = getattr(cached, CARRIED, None)
        if given is not None and given.shape[1] >= past:
            before = given
        if before is not None and before.shape[1] < past and _is_static(cached):
            # Tokens that compiled steps have written, which are text.
            before = pad(before, (0, past - before.shape[1]), value=int(Modality.TEXT))
        if before is None or before.shape[1] < past:
            raise ValueError(
                f"past_key_values must come from a call of the sparsified {self.name}, or the "
                f"modality of its {past} tokens must be given with `mms.set_modality`: got "
                f"{'nothing' if before is None else before.shape[1]} for them"
            )
        before = before[:, :past].to(fresh.device, torch.int8)
        return self._match_rows(before, len(fresh))

    def _with_past_frames(
        self, frames: Tensor | None, cached: Any, past: int, fresh: Tensor
    ) -> Tensor | None:
        before = getattr(cached, CARRIED_FRAMES, None)
        if before is None and frames is None:
            return None
        none = torch.zeros_like(fresh, dtype=torch.bool)
        if before is None or before.shape[1] < past:
            before = none.new_zeros(len(fresh), past)
        before = self._match_rows(before[:, :past].to(fresh.device), len(fresh))
        return torch.cat([before, none if frames is None else frames], 1)

    def _match_rows(self, known: Tensor, rows: int) -> Tensor:
        if len(known) == rows:
            return known
        if not len(known) or rows % len(known):
            raise ValueError(
                f"modality must have one row per row of the {rows} in the batch, or one for each "
                f"group of copies, got {len(known)} in {self.name}"
            )
        return known.repeat_interleave(rows // len(known), 0)


def _carry(cached: Any, modality: Tensor, frames: Tensor | None) -> None:
    """Let a cache carry what its tokens are."""
    setattr(cached, CARRIED, modality)
    setattr(cached, CARRIED_FRAMES, frames)

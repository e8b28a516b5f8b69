"""One attention layer of somebody else's model: what it is given, and what it makes of it.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import pad

from mm_sparse._checks import autocast_inputs
from mm_sparse.attention import dense_length, score_select_attend
from mm_sparse.config import SparseConfig
from mm_sparse.integrations.call import AttentionCall
from mm_sparse.integrations.discovery import AttentionModule
from mm_sparse.integrations.forward_context import in_backward
from mm_sparse.integrations.last_call import LastCall, SelectionSnapshot, joined, thinned
from mm_sparse.integrations.options import AttentionOptions
from mm_sparse.integrations.shared_state import Settings, Shared
from mm_sparse.integrations.standby.standby import Standby, shortest_sparse
from mm_sparse.kernels.ops import supports
from mm_sparse.layout import CallLayout, in_patch_order, restore
from mm_sparse.scorers import DescriptorCache, PooledScorer, Scorer
from mm_sparse.selection import Scores, Selection

if TYPE_CHECKING:
    from mm_sparse.integrations.ulysses.head_part import HeadPart

R = TypeVar("R")
# The attribute of a module that says which layer serves it.
LAYER = "_mm_sparse_layer"
Shown = tuple[Scores | None, Selection | None]
"""What those who watch are shown of a sparse call."""
# Entries of a selection that a layer keeps for `report`; of longer ones, every n-th tile.
KEPT_ENTRIES = 1 << 16
_POOLED = PooledScorer()


class Source(Protocol):
    """Where the layouts of a layer come from."""

    def layout_of_call(
        self, module: nn.Module, q: Tensor, k: Tensor, mask: Any, options: AttentionOptions
    ) -> CallLayout:
        """Layout of a call; a ValueError says why there is none."""
        ...


class SparseLayer(ABC):
    """Serves one attention module; kept outside the module tree."""

    head_split: HeadPart | None = None
    """Which heads of a call are this rank's; None where every call has all."""
    standby: Standby | None = None
    """Of a layer that is wrapped only while something can make it run sparse; else None."""

    def __init__(self, item: AttentionModule, shared: Shared, source: Source) -> None:
        self.name, self.module, self.modality = item.name, item.module, item.modality
        self.refusal, self.cross = item.refusal, item.cross
        self.most_tokens = item.most_tokens
        """In a call, of inputs that the model is made for; None where it takes any number."""
        self.shared, self.source = shared, source
        self.state: Any = None
        """What `sparsify` did to the model that the layer is of; set there."""
        self._scorer: Scorer | None = None
        self.record: LastCall | None = None
        self._known_least: tuple[Any, Any, int] = (None, None, 0)
        """Config and device of the last call, and from how many keys on it may run sparse there."""
        self._noted: LastCall | None = None
        """What `is_short` noted last."""

    @abstractmethod
    def attach(self) -> None:
        """Have the module ask this layer."""

    @abstractmethod
    def detach(self) -> None:
        """Undo `attach`."""

    @property
    def scorer(self) -> Scorer | None:
        """Of its own, or what `override_scorers` says; None for the score without training."""
        return self.shared.settings.scorers.get(self.name, self._scorer)

    @scorer.setter
    def scorer(self, scorer: Scorer | None) -> None:
        self._scorer = scorer

    def wrap(self) -> None:  # noqa: B027 - a name in a config is enough for most
        """Have the module ask this layer, which it did not since `attach`."""

    def unwrap(self) -> None:  # noqa: B027
        """Undo `wrap`."""

    def idle_mode(self) -> tuple[str, str]:
        """Mode and reason of a layer without a call that anybody could tell of."""
        known = self.known_mode()
        if known[0] != "sparse" or self.standby is None or self.standby.wrapped:
            return known
        least = shortest_sparse(self.shared.config)
        return "dense", f"never reaches dense_below ({least}): {self.most_tokens} tokens at most"

    def check_detachable(self) -> None:  # noqa: B027 - most layers can always be detached
        """Raise where `detach` cannot restore the module."""

    def taken_away(self) -> str:
        """Who else decides what the module attends with, after `sparsify`; empty if nobody."""
        return ""

    @property
    def index(self) -> int | None:
        """Number of the layer in its decoder, None elsewhere."""
        return None

    def known_mode(self, config: SparseConfig | None = None) -> tuple[str, str]:
        """Mode and reason as far as they are known before a call.

        Args:
            config: of the model, of a caller who knows it.
        """
        config = self.shared.config if config is None else config
        named = config.dense_layers
        if named and not {self.index, self.name}.isdisjoint(named):
            return "dense", "in dense_layers"
        if self.refusal is not None:
            return "refused", self.refusal
        if self.cross:
            return "dense", "cross-attention"
        if config.backend == "dense":
            return "dense", 'backend is "dense"'
        return "sparse", ""

    def early_mode(
        self, tokens: int | None, device: torch.device, config: SparseConfig | None = None,
        kind: str = "call",
    ) -> tuple[str, str]:  # fmt: skip
        """The same of a call that sees so many tokens; None where they are another sequence's.

        Args:
            kind: of the call, as `dense_length` has it.
        """
        config = self.shared.config if config is None else config
        known = self.known_mode(config)
        if known[0] != "sparse":
            return known
        if tokens is None:
            return "dense", "cross-attention"
        least = dense_length(config, device, kind)
        if tokens < least:
            return "dense", f"{tokens} tokens < dense_below ({least})"
        return "sparse", ""

    def is_short(self, queries: int, keys: int, device: torch.device) -> bool:
        """Whether a call has so few keys that it is dense whatever its mask shows; notes it then.

        A short call may take less time than the questions that `run` asks of a call.
        """
        settings = self.shared.settings
        if settings.watchers or keys >= self._least(settings.config, device):
            return False
        record = self.record
        same = record is not None and record.keys == keys and record.queries == queries
        if not same or self._noted is not record:
            mode = "dense", f"{keys} tokens < dense_below ({self._known_least[2]})"
            record = self._noted = LastCall(*mode, queries, keys)
            self.record = record
        return True

    def _least(self, config: SparseConfig, device: torch.device) -> int:
        """Keys below which every call is dense because it is short; 0 for layers never sparse."""
        known, where, least = self._known_least
        if known is not config or where != device:
            sparse = self.known_mode(config)[0] == "sparse"
            least = dense_length(config, device) if sparse else 0
            self._known_least = config, device, least
        return least

    def error(self, what: object) -> ValueError:
        """The error of a layer that cannot do what it is asked."""
        return ValueError(f"{self.name} ({type(self.module).__name__}) cannot run sparse: {what}")

    def refuse(self, problem: object) -> tuple[str, str]:
        """Mode and reason of a call that cannot be served; an error if that is strict."""
        if self.shared.strict:
            raise self.error(problem) from None
        return "refused", str(problem)

    def note(self, mode: tuple[str, str], queries: int, keys: int) -> None:
        """Record a call that ran as without us."""
        self.record = LastCall(*mode, queries, keys)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: AttentionOptions,
        original: Callable[[], R], format_output: Callable[[Tensor], R],
        ordered: CallLayout | None = None,
    ) -> tuple[R, LastCall]:  # fmt: skip
        """One attention call: sparse where it can be, else as the model computes it.

        Gives also what is remembered of the call: another thread may change `record`.

        Args:
            original: computes the call as without `sparsify`.
            format_output: makes of (B, N, H, D) what the library wants.
            ordered: layout of a call whose tokens come, and go back, in patch order.
        """
        shared = self.shared
        settings = shared.settings
        start = _clock(q) if settings.timed else None
        call, kept, shown = None, None, (None, None)
        in_view = self._in_view(q, k, mask, options)
        kind = "planned step" if q.shape[2] == 1 < k.shape[2] else "call"
        mode, reason = self.early_mode(in_view, q.device, settings.config, kind)
        if mode == "sparse":
            problem: object = self.problem(q, k, v, mask, options)
            if problem is None:
                try:
                    call = ordered or self.source.layout_of_call(self.module, q, k, mask, options)
                except ValueError as error:
                    problem = error
            if problem is not None:
                mode, reason = self.refuse(problem)
        scale = scale_of(q, options.scale)
        if call is None:
            result = original()
            if settings.watchers and settings.config.backend == "dense" and not self.cross:
                call = self._layout_of_dense_call(q, k, v, mask, options)
                if call is not None:
                    config = shared.layer_config(self.index, self.name, call.prefix)
                    call, q, k, v = in_patch_order(call, config, q, k, v)
        else:
            config = shared.layer_config(self.index, self.name, call.prefix, settings.config)
            if self.head_split is not None:
                config = self.head_split.config_of(config)
            # Before the tokens move: the cache knows its keys by their very tensor.
            alone = not settings.watchers and settings.attention_override is None
            cache = self._descriptors(k) if alone else None
            # Rotary embeddings come in float32 where the model does not: scores need no more.
            q, k, v = autocast_inputs(q, k, v)
            call, q, k, v = in_patch_order(call, config, q, k, v)
            out, kept, shown = self._sparse(q, k, v, call, config, scale, cache, settings)
            if ordered is None:
                out = restore(out, call.layout, call.first, dim=1)
            result = format_output(out.contiguous())
        record = self.record = LastCall(mode, reason, q.shape[-2], k.shape[-2], kept)
        if settings.watchers and not (settings.recomputed or in_backward()):
            # What watchers compute is none of the saved tensors of a checkpoint around the layer.
            # Detached, as an output leads to the node that saves it: nobody would collect the two.
            with saved_tensors_hooks(torch.Tensor.detach, _as_it_is):
                self._notify(q, k, v, scale, call, shown, reason, start, kept is not None)
        return result, record

    @property
    def ranks(self) -> Scorer:
        """The scorer of its own, or the one without training; of the heads that are this rank's."""
        scorer = self.scorer or _POOLED
        return scorer if self.head_split is None else self.head_split.scorer_of(scorer)

    def config_of_step(self) -> SparseConfig:
        """The layer's own config where no prefix is always kept, for the heads of this rank."""
        config = self.shared.layer_config(self.index, self.name, 0, self.shared.config)
        return config if self.head_split is None else self.head_split.config_of(config)

    def _descriptors(self, k: Tensor) -> DescriptorCache | None:
        """Of the keys that calls before this one had, where the model keeps them."""
        return None

    def _sparse(
        self, q: Tensor, k: Tensor, v: Tensor, call: CallLayout, config: SparseConfig,
        scale: float, cache: DescriptorCache | None, settings: Settings,
    ) -> tuple[Tensor, SelectionSnapshot | None, Shown]:  # fmt: skip
        """(B, N, H, D), what to remember, and what watchers are shown."""
        override = settings.attention_override
        if override is not None:
            given = AttentionCall(
                name=self.name, module=self.module, q=q, k=k, v=v, scale=scale, config=config,
                layout=call.layout, first=call.first,
            )  # fmt: skip
            return override(given).transpose(1, 2), None, (None, None)
        scorer = settings.scorers.get(self.name, self._scorer) or _POOLED
        if scorer is not _POOLED:
            weight = next(scorer.parameters(), None)
            if weight is not None and weight.device != q.device:
                scorer.to(q.device)
        split, share = self.head_split, None
        if split is not None:
            scorer, share = split.scorer_of(scorer), split.share
        width, v = v.shape[-1], as_wide_as_keys(v, k)
        parts: list[SelectionSnapshot] = []
        shown: Shown = (None, None)
        watched = settings.scored

        def note(scores: Scores, selection: Selection) -> None:
            nonlocal shown
            parts.append(thinned(selection, KEPT_ENTRIES))
            if watched:
                shown = scores, selection

        out = score_select_attend(
            q, k, v, call, config, scorer, scale, cache=cache, note=note, whole=watched, share=share
        )
        kept = parts[0] if len(parts) == 1 else joined(parts) if parts else None
        return out[..., :width].transpose(1, 2), kept, shown

    def _notify(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, call: CallLayout | None,
        shown: Shown, reason: str, start: Any, sparse: bool,
    ) -> None:  # fmt: skip
        """Give a call to those who watch."""
        shared = self.shared
        config = None if call is None else shared.layer_config(self.index, self.name, call.prefix)
        if config is not None and self.head_split is not None:
            config = self.head_split.config_of(config)
        given = AttentionCall(
            name=self.name, module=self.module, q=q, k=k, v=v, scale=scale, scores=shown[0],
            selection=shown[1], reason=reason,
            seconds=None if start is None else _clock(q) - start, config=config,
            layout=None if call is None else call.layout, first=0 if call is None else call.first,
            sparse=sparse,
        )  # fmt: skip
        for watcher in shared.settings.watchers:
            watcher(given)

    def _layout_of_dense_call(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: AttentionOptions
    ) -> CallLayout | None:
        """Where the tokens of a call that runs dense would be, if its layout can be found."""
        if self.refusal is not None or self.problem(q, k, v, mask, options) is not None:
            return None
        try:
            return self.source.layout_of_call(self.module, q, k, mask, options)
        except ValueError:
            return None

    @abstractmethod
    def _in_view(self, q: Tensor, k: Tensor, mask: Any, options: AttentionOptions) -> int | None:
        """Tokens that a call sees; None where they are another sequence's."""

    def problem(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: AttentionOptions
    ) -> str | None:
        """Why a call cannot be served, None if it can."""
        if options.unsupported is not None:
            return f"it needs {options.unsupported}"
        if self.module.training and options.dropout:
            return f"dropout of {options.dropout} on attention weights while training"
        if v.shape[-1] > k.shape[-1]:
            return f"values have {v.shape[-1]} dimensions, keys only {k.shape[-1]}"
        config = self.shared.config
        # A watcher of a dense run asks what could run sparse.
        return supports(q, k, config.unit, "auto" if config.backend == "dense" else config.backend)


def scale_of(q: Tensor, scale: float | None) -> float:
    """Factor on q.k: the one that a call names, else 1 / sqrt(D)."""
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def as_wide_as_keys(v: Tensor, k: Tensor) -> Tensor:
    """Values with zeros behind them where keys have more dimensions."""
    missing = k.shape[-1] - v.shape[-1]
    return pad(v, (0, missing)) if missing > 0 else v


def _clock(q: Tensor) -> float:
    if q.device.type == "cuda":
        torch.cuda.synchronize(q.device)
    return time.perf_counter()


def _as_it_is(x: Tensor) -> Tensor:
    return x

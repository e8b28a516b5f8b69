"""One attention layer of somebody else's model: what it is given, and what it makes of it.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mm_sparse._checks import autocast_inputs
from mm_sparse.attention import attend, dense_length, rank_and_attend
from mm_sparse.config import SparseConfig
from mm_sparse.integrations.call import AttentionCall
from mm_sparse.integrations.discovery import AttentionModule
from mm_sparse.integrations.last_call import LastCall, SelectionSnapshot, joined, thinned
from mm_sparse.integrations.shared_state import Shared
from mm_sparse.kernels.ops import supports
from mm_sparse.layout import CallLayout, TokenLayout, in_patch_order, restore
from mm_sparse.scorers import DescriptorCache, PooledScorer, Scorer
from mm_sparse.selection import Scores, Selection, select

R = TypeVar("R")
# The attribute of a module that says which layer serves it.
LAYER = "_mm_sparse_layer"
# Entries of a selection that a layer keeps for `report`; of longer ones, every n-th tile.
KEPT_ENTRIES = 1 << 16
_POOLED = PooledScorer()


class Source(Protocol):
    """Where the layouts of a layer come from."""

    def place(
        self, module: nn.Module, q: Tensor, k: Tensor, mask: Any, options: dict[str, Any]
    ) -> CallLayout:
        """Layout of a call; a ValueError says why there is none."""
        ...


class SparseLayer(ABC):
    """Serves one attention module; kept outside the module tree."""

    def __init__(self, found: AttentionModule, shared: Shared, source: Source) -> None:
        self.name, self.module, self.modality = found.name, found.module, found.modality
        self.refusal, self.cross = found.refusal, found.cross
        self.shared, self.source = shared, source
        self.scorer: Scorer | None = None
        self.record: LastCall | None = None
        self.ordered: CallLayout | None = None
        """Of a call whose tokens came in patch order, and go back in it."""

    @abstractmethod
    def attach(self) -> None:
        """Have the module ask this layer."""

    @abstractmethod
    def detach(self) -> None:
        """Undo `attach`."""

    @property
    def index(self) -> int | None:
        """Number of the layer in its decoder, None elsewhere."""
        return None

    def known_mode(self) -> tuple[str, str]:
        """Mode and reason as far as they are known before a call."""
        if self.refusal is not None:
            return "refused", self.refusal
        if self.cross:
            return "dense", "cross-attention"
        if not {self.index, self.name}.isdisjoint(self.shared.config.dense_layers):
            return "dense", "in dense_layers"
        if self.shared.config.backend == "dense":
            return "dense", 'backend is "dense"'
        return "sparse", ""

    def early_mode(self, tokens: int | None, device: torch.device) -> tuple[str, str]:
        """The same of a call that sees so many tokens; None where they are another sequence's."""
        known = self.known_mode()
        if known[0] != "sparse":
            return known
        if tokens is None:
            return "dense", "cross-attention"
        least = dense_length(self.shared.config, device)
        if tokens < least:
            return "dense", f"{tokens} tokens < dense_below ({least})"
        return "sparse", ""

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
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any],
        original: Callable[[], R], format_output: Callable[[Tensor], R],
    ) -> R:  # fmt: skip
        """`format_output` of what sparse attention gives, (B, N, H, D), or what `original`
        gives."""
        start = self._clock(q)
        given = options.get("scaling")
        scale = q.shape[-1] ** -0.5 if given is None else float(given)
        placed = scores = selection = kept = None
        mode, reason = self.early_mode(self._in_view(q, k, mask, options), q.device)
        if mode == "sparse":
            problem = self._problem(q, k, v, mask, options)
            if problem is not None:
                mode, reason = self.refuse(problem)
        if mode == "sparse":
            placed = self.ordered
        if mode == "sparse" and placed is None:
            try:
                placed = self.source.place(self.module, q, k, mask, options)
            except ValueError as error:
                mode, reason = self.refuse(error)
        if placed is not None:
            descriptors = None
            if not self.shared.watchers and self.shared.attention_override is None:
                descriptors = self._descriptors(k)
            # Rotary embeddings come in float32 where the model does not: scores need no more.
            q, k, v = autocast_inputs(q, k, v)
            placed, q, k, v = in_patch_order(placed, self._where(placed)[0], q, k, v)
            out, scores, selection, kept = self._sparse(q, k, v, placed, scale, descriptors)
            result = format_output(out)
        else:
            result = original()
            if self.shared.watchers and self.shared.config.backend == "dense" and not self.cross:
                placed = self._place_dense(q, k, v, mask, options)
                if placed is not None:
                    placed, q, k, v = in_patch_order(placed, self._where(placed)[0], q, k, v)
        self.record = LastCall(mode, reason, q.shape[-2], k.shape[-2], kept)
        if self.shared.watchers:
            seconds = None if start is None else self._clock(q) - start
            where = (None, None, 0) if placed is None else self._where(placed)
            call = AttentionCall(
                self.name, self.module, q, k, v, scale, scores, selection, reason, seconds, *where
            )
            for watcher in self.shared.watchers:
                watcher(call)
        return result

    @property
    def ranks(self) -> Scorer:
        """The scorer of its own, or the one without training."""
        return self.scorer or _POOLED

    def _descriptors(self, k: Tensor) -> DescriptorCache | None:
        """Of the keys that calls before this one had, where the model keeps them."""
        return None

    def _sparse(
        self, q: Tensor, k: Tensor, v: Tensor, placed: CallLayout, scale: float,
        descriptors: DescriptorCache | None,
    ) -> tuple[Tensor, Scores | None, Selection | None, SelectionSnapshot | None]:  # fmt: skip
        """What sparse attention gives; scores and selection, for watchers; what to remember."""
        config, layout, first = self._where(placed)
        if self.shared.attention_override is not None:
            none = (None, None, "", None)
            call = AttentionCall(
                self.name, self.module, q, k, v, scale, *none, config, layout, first
            )
            out = self.shared.attention_override(call).transpose(1, 2)
            return self._back(out, layout, first), None, None, None
        scorer = self.ranks
        weight = next(scorer.parameters(), None)
        if weight is not None and weight.device != q.device:
            scorer.to(q.device)
        width = v.shape[-1]
        if width < k.shape[-1]:
            v = pad(v, (0, k.shape[-1] - width))
        scores = selection = None
        if self.shared.watchers:
            # They are shown all scores, and can use their graph.
            scores = scorer(q, k, layout=layout, config=config, query_offset=first, scale=scale)
            selection = select(scores, layout, config)
            out, parts = attend(q, k, v, selection, scale=scale), [thinned(selection, KEPT_ENTRIES)]
        else:
            parts: list[SelectionSnapshot] = []
            out = rank_and_attend(
                q, k, v, placed, config, scorer, scale, descriptors,
                note=lambda part: parts.append(thinned(part, KEPT_ENTRIES)),
            )  # fmt: skip
        kept = parts[0] if len(parts) == 1 else joined(parts)
        out = self._back(out[..., :width].transpose(1, 2), layout, first)
        return out, scores, selection, kept

    def _back(self, out: Tensor, layout: TokenLayout, first: int) -> Tensor:
        """(B, N, H, D) in the order that the call's tokens came in."""
        if self.ordered is None:
            out = restore(out, layout, first, dim=1)
        return out.contiguous()

    def _where(self, placed: CallLayout) -> tuple[SparseConfig, TokenLayout, int]:
        """The layer's config, the layout and the place of the first query."""
        config = self.shared.layer_config(self.index, self.name, placed.prefix)
        return config, placed.layout, placed.first

    def _place_dense(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
    ) -> CallLayout | None:
        """Where the tokens of a call that runs dense would be, if they can be placed."""
        if self.refusal is not None or self._problem(q, k, v, mask, options) is not None:
            return None
        try:
            return self.source.place(self.module, q, k, mask, options)
        except ValueError:
            return None

    @abstractmethod
    def _in_view(self, q: Tensor, k: Tensor, mask: Any, options: dict[str, Any]) -> int | None:
        """Tokens that a call sees; None where they are another sequence's."""

    def _problem(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
    ) -> str | None:
        """Why a call cannot be served, None if it can."""
        if self.module.training and options.get("dropout"):
            return f"dropout of {options['dropout']} on attention weights while training"
        if v.shape[-1] > k.shape[-1]:
            return f"values have {v.shape[-1]} dimensions, keys only {k.shape[-1]}"
        config = self.shared.config
        # A watcher of a dense run asks what could run sparse.
        return supports(q, k, config.unit, "auto" if config.backend == "dense" else config.backend)

    def _clock(self, q: Tensor) -> Any:
        if not self.shared.timed:
            return None
        if q.device.type == "cuda":
            torch.cuda.synchronize(q.device)
        return time.perf_counter()

"""One attention layer of somebody else's model: what it is given, and what it makes of it.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mm_sparse.attention import attend
from mm_sparse.config import SparseConfig
from mm_sparse.dense import dense_length
from mm_sparse.found import Found
from mm_sparse.grid_order import in_patch_order, restore
from mm_sparse.kernels.ops import supports
from mm_sparse.layout import TokenLayout
from mm_sparse.placing import MaskMemo, Placed
from mm_sparse.plan import Plan
from mm_sparse.scorers import PooledScorer, Scorer, Scores
from mm_sparse.selection import Selection, select
from mm_sparse.validation import autocast_inputs

R = TypeVar("R")
# The attribute of a module that says which layer serves it.
LAYER = "_mm_sparse_layer"
# Entries of a selection that a layer keeps for `report`; of longer ones, every n-th tile.
KEPT_ENTRIES = 1 << 18
_POOLED = PooledScorer()


@dataclass(frozen=True, eq=False)
class Call:
    """What a layer was given and what it made of it, as `retrofit.watch` hands it out.

    Tokens of `q`, `k` and `v` stand as `layout` and `plan()` have them: a picture in patch order if
    `layout.order` is set. `grid_order.restore(call.q, call.layout, call.first)` is as the model
    has them.
    """

    name: str
    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    scores: Scores | None
    """None if the layer ran dense; `scores.plan.layout` is the layout."""
    selection: Selection | None
    reason: str
    """Why it ran dense, or empty."""
    seconds: float | None
    """Only while timing."""
    config: SparseConfig | None = None
    """The layer's own; None where the call has no layout."""
    layout: TokenLayout | None = None
    """Of the keys, also of a layer that runs dense because `backend` says so."""
    first: int = 0
    """Place of the first query among the keys."""

    def plan(self) -> Plan:
        """Tiles and units of the call.

        Raises:
            ValueError: the call has no layout.
        """
        if self.layout is None or self.config is None:
            raise ValueError(f"{self.name} has no layout: {self.reason or 'it was not placed'}")
        return self.layout.plan(
            self.config,
            num_query_heads=self.q.shape[1],
            num_kv_heads=self.k.shape[1],
            num_queries=self.q.shape[2],
            query_offset=self.first,
        )


@dataclass
class Shared:
    """What the layers of a sparsified model have in common."""

    config: SparseConfig
    strict: bool
    watchers: list[Callable[[Call], None]] = field(default_factory=list)
    timed: bool = False
    plain: dict[Any, Placed] = field(default_factory=dict)
    """Layouts of calls without a mask."""
    own: dict[Any, tuple[SparseConfig, SparseConfig]] = field(default_factory=dict)
    """By index of a layer and prefix: `config` as it was, and the layer's own."""
    masked: MaskMemo = field(default_factory=MaskMemo)

    def config_of(self, index: int | None, prefix: int) -> SparseConfig:
        """The config of a layer whose first `prefix` tokens are always kept; checked once."""
        config, made = self.own.get((index, prefix), (None, None))
        if made is None or config is not self.config:
            made = self.config.of_layer(index)
            if prefix > made.sinks:
                made = replace(made, sinks=prefix)
            self.own[index, prefix] = self.config, made
        return made


@dataclass(frozen=True, eq=False)
class Record:
    """The last call of a layer, for `report`."""

    mode: str
    reason: str
    queries: int
    keys: int
    selection: Selection | None


class Source(Protocol):
    """Where the layouts of a layer come from."""

    def place(
        self, module: nn.Module, q: Tensor, k: Tensor, mask: Any, options: dict[str, Any]
    ) -> Placed:
        """Layout of a call; a ValueError says why there is none."""
        ...


class Layer(ABC):
    """Serves one attention module; kept outside the module tree."""

    def __init__(self, found: Found, shared: Shared, source: Source) -> None:
        self.name, self.module, self.modality = found.name, found.module, found.modality
        self.refusal, self.cross = found.refusal, found.cross
        self.shared, self.source = shared, source
        self.scorer: Scorer | None = None
        self.record: Record | None = None

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
        if self.index is not None and self.index in self.shared.config.dense_layers:
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
        self.record = Record(*mode, queries, keys, None)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any],
        stock: Callable[[], R], finish: Callable[[Tensor], R],
    ) -> R:  # fmt: skip
        """`finish` of what sparse attention gives, (B, N, H, D), or what `stock` gives."""
        start = self._clock(q)
        given = options.get("scaling")
        scale = q.shape[-1] ** -0.5 if given is None else float(given)
        placed = scores = selection = None
        mode, reason = self.early_mode(self._in_view(q, k, mask, options), q.device)
        if mode == "sparse":
            problem = self._problem(q, k, v, mask, options)
            if problem is not None:
                mode, reason = self.refuse(problem)
        if mode == "sparse":
            try:
                placed = self.source.place(self.module, q, k, mask, options)
            except ValueError as error:
                mode, reason = self.refuse(error)
        if placed is not None:
            # Rotary embeddings come in float32 where the model does not: scores need no more.
            q, k, v = autocast_inputs(q, k, v)
            placed, q, k, v = in_patch_order(placed, self._where(placed)[0], q, k, v)
            out, scores, selection = self._sparse(q, k, v, placed, scale)
            result = finish(out)
        else:
            result = stock()
            if self.shared.watchers and self.shared.config.backend == "dense" and not self.cross:
                placed = self._place_dense(q, k, v, mask, options)
                if placed is not None:
                    placed, q, k, v = in_patch_order(placed, self._where(placed)[0], q, k, v)
        kept = None if selection is None else selection.thinned(KEPT_ENTRIES)
        self.record = Record(mode, reason, q.shape[-2], k.shape[-2], kept)
        if self.shared.watchers:
            seconds = None if start is None else self._clock(q) - start
            where = (None, None, 0) if placed is None else self._where(placed)
            call = Call(
                self.name, self.module, q, k, v, scale, scores, selection, reason, seconds, *where
            )
            for watcher in self.shared.watchers:
                watcher(call)
        return result

    def _sparse(
        self, q: Tensor, k: Tensor, v: Tensor, placed: Placed, scale: float
    ) -> tuple[Tensor, Scores, Selection]:
        config, layout, _ = self._where(placed)
        scorer = self.scorer or _POOLED
        weight = next(scorer.parameters(), None)
        if weight is not None and weight.device != q.device:
            scorer.to(q.device)
        # Selection passes no gradient; only a watcher can use the scores' graph.
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self.shared.watchers)):
            scores = scorer(
                q, k, layout=layout, config=config, query_offset=placed.first, scale=scale
            )
        selection = select(scores, layout, config)
        width = v.shape[-1]
        if width < k.shape[-1]:
            v = pad(v, (0, k.shape[-1] - width))
        out = attend(q, k, v, selection, scale=scale)[..., :width].transpose(1, 2)
        return restore(out, layout, placed.first, dim=1).contiguous(), scores, selection

    def _where(self, placed: Placed) -> tuple[SparseConfig, TokenLayout, int]:
        """The layer's config, the layout and the place of the first query."""
        return self.shared.config_of(self.index, placed.prefix), placed.layout, placed.first

    def _place_dense(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
    ) -> Placed | None:
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
        # A watcher of a dense run scores on this device, whose own kernels those are.
        backend = "auto" if config.backend == "dense" else config.backend
        return supports(q, k, config.unit, backend)

    def _clock(self, q: Tensor) -> Any:
        if not self.shared.timed:
            return None
        if q.device.type == "cuda":
            torch.cuda.synchronize(q.device)
        return time.perf_counter()

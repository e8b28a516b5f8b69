"""The attention function that sparsified transformers models call, one object per layer.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mm_sparse.attention import attend
from mm_sparse.config import SparseConfig
from mm_sparse.dense import dense_attention, dense_length
from mm_sparse.hf_layers import DISPATCH, UNSERVED, Found, defining_class
from mm_sparse.hf_layouts import Placed, Source, is_causal
from mm_sparse.hf_modality import ModalityTracker
from mm_sparse.kernels.ops import supports
from mm_sparse.lazy_mask import LazyMask, lazy_mask
from mm_sparse.scorers import PooledScorer, Scorer, Scores
from mm_sparse.selection import Selection, select
from mm_sparse.validation import autocast_inputs

NAME = "mm_sparse"
LAYER = "_mm_sparse_layer"
# Entries of a selection that a layer keeps for `report`; of longer ones, every n-th tile.
KEPT_ENTRIES = 1 << 18
_POOLED = PooledScorer()


@dataclass(frozen=True, eq=False)
class Call:
    """What a layer was given and what it made of it, as `retrofit.watch` hands it out."""

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


@dataclass
class Shared:
    """What the layers of a sparsified model have in common."""

    config: SparseConfig
    strict: bool
    watchers: list[Callable[[Call], None]] = field(default_factory=list)
    timed: bool = False
    plain: dict[Any, Placed] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Record:
    """The last call of a layer, for `report`."""

    mode: str
    reason: str
    queries: int
    keys: int
    selection: Selection | None


class Layer:
    """Serves one attention module; kept outside the module tree."""

    def __init__(self, found: Found, shared: Shared, tracker: ModalityTracker) -> None:
        self.name, self.module, self.owners = found.name, found.module, found.owners
        self.refusal, self.cross, self.modality = found.refusal, found.cross, found.modality
        self.shared = shared
        self.stock = getattr(self.config, "_attn_implementation", None) or "sdpa"
        """The attention implementation that the layer had before."""
        modality = found.modality
        encoder_decoder = getattr(found.root.config, "is_encoder_decoder", False)
        if encoder_decoder and modality is None and is_causal(found.module, {}):
            # The ids that the tracker sees are the encoder's; a decoder of this kind writes text.
            tracker = ModalityTracker(found.root)
        self.source = Source(tracker, modality, shared.plain)
        self.scorer: Scorer | None = None
        self.record: Record | None = None

    @property
    def index(self) -> int | None:
        """Number of the layer in its decoder, None elsewhere."""
        return getattr(self.module, "layer_idx", None) if self.modality is None else None

    @property
    def config(self) -> Any:
        """The transformers config that names the attention implementation."""
        return getattr(self.module, "config", None)

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

    def error(self, what: object) -> ValueError:
        """The error of a layer that cannot do what it is asked."""
        return ValueError(f"{self.name} ({type(self.module).__name__}) cannot run sparse: {what}")

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        start = self._clock(q)
        given = options.get("scaling")
        scale = q.shape[-1] ** -0.5 if given is None else float(given)
        placed = scores = selection = weights = None
        mode, reason = self._mode(q, k, v, mask, options)
        if mode == "sparse":
            try:
                placed = self.source.place(self.module, q, k, mask, options)
            except ValueError as error:
                mode, reason = self._refuse(error)
        if placed is not None:
            # Rotary embeddings come in float32 where the model does not: scores need no more.
            q, k, v = autocast_inputs(q, k, v)
            out, scores, selection = self._sparse(q, k, v, placed, scale)
        else:
            out, weights = self._dense(q, k, v, mask, options, scale)
        self.record = Record(mode, reason, q.shape[2], k.shape[2], _thin(selection))
        if self.shared.watchers:
            seconds = None if start is None else self._clock(q) - start
            call = Call(self.name, self.module, q, k, v, scale, scores, selection, reason, seconds)
            for watcher in self.shared.watchers:
                watcher(call)
        return out, weights

    def _sparse(
        self, q: Tensor, k: Tensor, v: Tensor, placed: Placed, scale: float
    ) -> tuple[Tensor, Scores, Selection]:
        config, layout = self.shared.config, placed.layout
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
        out = attend(q, k, v, selection, scale=scale)[..., :width]
        return out.transpose(1, 2).contiguous(), scores, selection

    def _dense(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any], scale: float
    ) -> tuple[Tensor, Tensor | None]:
        name = self.stock
        if options.get("cu_seq_lens_q") is not None and "flash" not in name and not self.cross:
            # The stock functions would let packed sequences see each other.
            placed = self.source.place(self.module, q, k, mask, options)
            out = dense_attention(
                q, k, v, layout=placed.layout, config=self.shared.config,
                query_offset=placed.first, scale=scale,
            )  # fmt: skip
            return out.transpose(1, 2).contiguous(), None
        return run_stock(self.module, name, q, k, v, mask, options)

    def _mode(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
    ) -> tuple[str, str]:
        config, queries, keys = self.shared.config, q.shape[2], k.shape[2]
        known = self.known_mode()
        if known[0] != "sparse":
            return known
        recipe = mask.recipe if isinstance(mask, LazyMask) else None
        alone = mask is None and not is_causal(self.module, options)
        if (recipe is not None and recipe.is_cross) or (alone and keys != queries):
            return "dense", "cross-attention"
        tokens = keys if recipe is None else min(keys, recipe.first + queries)
        least = dense_length(config, q.device)
        if tokens < least:
            return "dense", f"{tokens} tokens < dense_below ({least})"
        problem = self._problem(q, k, v, mask, options)
        return ("sparse", "") if problem is None else self._refuse(problem)

    def _problem(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
    ) -> str | None:
        for argument, meaning in UNSERVED.items():
            if options.get(argument) is not None:
                return f"it needs {meaning} (`{argument}`)"
        if self.module.training and options.get("dropout"):
            return f"dropout of {options['dropout']} on attention weights while training"
        if mask is None and options.get("sliding_window") and not is_causal(self.module, options):
            return "it came with a `sliding_window` to both sides and without a mask"
        if v.shape[-1] > k.shape[-1]:
            return f"values have {v.shape[-1]} dimensions, keys only {k.shape[-1]}"
        if isinstance(mask, LazyMask):
            want, rows = (q.shape[2], k.shape[2]), mask.recipe.shape[0]
            if mask.recipe.shape[1:] != want or rows not in (1, q.shape[0]):
                return f"its mask is {mask.recipe.shape}, q and k are for {(q.shape[0], *want)}"
        return supports(q, k, self.shared.config.unit, self.shared.config.backend)

    def _refuse(self, problem: object) -> tuple[str, str]:
        if self.shared.strict:
            raise self.error(problem) from None
        return "refused", str(problem)

    def _clock(self, q: Tensor) -> Any:
        if not self.shared.timed:
            return None
        if q.device.type == "cuda":
            torch.cuda.synchronize(q.device)
        return time.perf_counter()


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What transformers calls under the name "mm_sparse": (B, N, H, D) and None."""
    layer = getattr(module, LAYER, None)
    if layer is None:
        # Another model that was built with the very config object of a sparsified one.
        return run_stock(module, "sdpa", query, key, value, attention_mask, options)
    return layer(query, key, value, attention_mask, options)


def run_stock(
    module: nn.Module, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Any,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The call as the model makes it without us, with the mask that it makes then."""
    if any(options.get(n) is not None for n in ("softcap", "s_aux", "head_mask")):
        name = "eager"  # SDPA would leave them out in silence
    if isinstance(mask, LazyMask):
        mask = mask.recipe.stock(name)
    elif name == "eager" and isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    return _stock_function(type(module), name)(module, q, k, v, mask, **options)


@cache
def _stock_function(cls: type, name: str) -> Any:
    from transformers import AttentionInterface

    home = vars(import_module(defining_class(cls).__module__))
    eager = home.get("eager_attention_forward")
    if name == "eager" and eager is not None:
        return eager
    interface = home.get(DISPATCH) or AttentionInterface()
    return interface["sdpa" if name == "eager" else name]


def register() -> None:
    """Make transformers know the name "mm_sparse"; again is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, torch.compiler.disable(attention_forward))
    AttentionMaskInterface.register(NAME, torch.compiler.disable(lazy_mask))


def _thin(selection: Selection | None) -> Selection | None:
    """A selection of every n-th tile, small enough to keep."""
    if selection is None:
        return None
    step = -(-selection.index.numel() // KEPT_ENTRIES)
    if step <= 1:
        return selection
    plan, some = selection.plan, slice(None, None, step)
    plan = replace(
        plan,
        tiles=plan.tiles[:, some],
        hull=plan.hull[:, some],
        tile_modality=plan.tile_modality[:, some],
        regular_tiles=False,
    )
    return Selection(selection.index[:, :, some].clone(), selection.count[:, :, some].clone(), plan)

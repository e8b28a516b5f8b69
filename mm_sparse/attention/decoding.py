"""Steps of decoding whose work does not grow with the context: geometry is written in place.

A sequence that grows by a token changes a few numbers: where it ends, the unit that the token falls
into, and the budgets. They lie in tensors of their own, of a size for the tokens to come, so that a
step makes no layout and no plan, waits for nothing, and can be recorded in a CUDA graph.

B batch, H query heads, K KV heads, M key tokens so far, C key tokens at most, U units, D head dim
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mm_sparse.attention.selected import attend_selection
from mm_sparse.config import SparseConfig
from mm_sparse.layout import Plan, TokenLayout
from mm_sparse.modality import Modality
from mm_sparse.scorers import DescriptorCache, Scorer, ScorerPart
from mm_sparse.selection import Selection, topk_lists

# Tokens to come that a growing cache gets room for, beside an eighth of what is there.
SPARE_TOKENS = 2048
# Room for units that are cut short by segments, of which the next sequence may have more.
SPARE_UNITS = 128
# Of a token to come a scorer needs the maps of text alone.
TEXT_ALONE = frozenset({int(Modality.TEXT)})
ANY_MODALITY = frozenset(map(int, Modality))


def decodes_in_place(config: SparseConfig, scorer: Scorer) -> str | None:
    """Why steps under a config and with a scorer need plans of their own; None if they do not."""
    if config.top_p is not None:
        return "top_p"
    if config.sample_ratio:
        return "sample_ratio"
    if config.coarse_factor > 1:
        return "coarse_factor"
    scorer = scorer.whole if isinstance(scorer, ScorerPart) else scorer
    if type(scorer).forward is not Scorer.forward or type(scorer).score is not Scorer.score:
        return f"{type(scorer).__name__} writes forward or score itself"
    if scorer._forward_hooks or scorer._forward_pre_hooks:
        return "the scorer has hooks"
    return None


def capacity_for(tokens: int) -> int:
    """Room for a cache that grows: whole pages, so that it is made anew seldom."""
    return math.ceil((tokens + tokens // 8 + 1) / SPARE_TOKENS) * SPARE_TOKENS


class DecodingGeometry:
    """Tiles, units and budgets of a step with one query a row, for layers that see the same keys.

    Args:
        layout: of the tokens that are there, M of them, in their order.
        config: whose tiles, units, sinks, window and floors hold.
        group: query heads of a KV head.
        capacity: C, from M on.
    """

    def __init__(
        self, layout: TokenLayout, config: SparseConfig, group: int, capacity: int
    ) -> None:
        self.capacity, self.config, self.group = capacity, config, group
        whole = self._whole_plan(layout)
        batch, units = whole.units.shape[:2]
        # Whole multiples: kernels are compiled for what a number of units divides by.
        room = math.ceil((units + units // 8 + SPARE_UNITS) / 64) * 64
        self.tokens = 0
        """M of the step that is written down; 0 before the first, or where a graph wrote it."""
        self.sequence: Any = None
        """A weak reference to what the sequence is known by."""
        self.leader: Any = None
        """A weak reference to whoever writes down the steps that the host does not see."""
        self.led: Any = None
        """A weak reference to what the sequence was known by when the leader was chosen."""
        self.written = 0
        """How many sequences were written down."""

        def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=layout.device)

        # Of the whole sequence, written by `begin`.
        self._table, self._kind = new(room, 2), new(room, dtype=torch.int8)
        self._sinks = new(room, dtype=torch.bool)
        self._unit_of = new(capacity, dtype=torch.int64)
        self._before = new(room + 1, dtype=torch.int64)
        # Of a step, written by `advance`.
        self._units, self._span, self._window = new(room, 2), new(1, 2), new(1, 2)
        self._last = new(1, dtype=torch.int64)
        self._visible_tokens = new(1, dtype=torch.int64)
        self.place = new(1, 2)
        """(B, 1, 2): the position of the query and how many there are, for distances."""
        self.place[..., 1] = 1
        self.plan = replace(
            whole, query_offset=0, units=self._units, unit_modality=self._kind, span=self._span,
            tile_span=self._span, unit_offset=-1,
            tile_modality=torch.full_like(whole.tile_modality, int(Modality.TEXT)),
        )  # fmt: skip
        self.newest = replace(
            self.plan, units=new(1, 2), unit_modality=new(1, dtype=torch.int8),
        )  # fmt: skip
        """The plan of the newest unit alone."""
        self._fixed: dict[Any, Any] = {
            ("sinks", config.sinks): self._sinks,
            ("near", config.window): self._window,
            # Which they are would have to be looked up anew for every sequence.
            "modalities": ANY_MODALITY,
            "tile_modalities": TEXT_ALONE,
            "visible_tokens": self._visible_tokens,
            "query_modality": self.plan.tile_modality,
        }
        self._of_config(whole, config)
        self._budgets: dict[SparseConfig, Tensor] = {}
        self._widths: dict[SparseConfig, int] = {}
        self._begin(whole, layout.length)

    def _whole_plan(self, layout: TokenLayout) -> Plan:
        """The plan of the sequence once it fills all the room."""
        whole = _with_text_to_come(layout, self.capacity)
        return whole.new_plan(self.config, self.group, 1, self.capacity - 1)

    def begin(self, layout: TokenLayout) -> bool:
        """Write down another sequence; False if it does not fit into what there is."""
        if layout.length > self.capacity or layout.batch != len(self.place):
            return False
        whole = self._whole_plan(layout)
        wide = any(
            whole.sharing(config=config).max_kept > width for config, width in self._widths.items()
        )
        if whole.units.shape[1] > self._table.shape[1] or wide:
            return False
        self._begin(whole, layout.length)
        return True

    def _begin(self, whole: Plan, known: int) -> None:
        # Tokens of which the layout says what they are; those behind them are text.
        self._known = known
        missing = self._table.shape[1] - whole.units.shape[1]
        table = pad(whole.units, (0, 0, 0, missing))
        self._table.copy_(table)
        self._kind.copy_(pad(whole.unit_modality, (0, missing), value=-1))
        self._sinks.copy_(pad(whole.sink_units, (0, missing)))
        self._before.copy_(pad(table[..., 1].long().cumsum(1), (1, 0)))
        ends = table.long().sum(-1).masked_fill(table[..., 1] == 0, self.capacity + 1)
        position = torch.arange(self.capacity, device=table.device)
        position = position.expand(len(table), -1).contiguous()
        self._unit_of.copy_(torch.searchsorted(ends, position, right=True))
        self._whole = whole
        self.tokens = 0
        self.written += 1

    def _of_config(self, whole: Plan, config: SparseConfig) -> None:
        pools = whole.sharing(config=config).live_query_pools
        self._fixed["live_query_pools", config] = pools
        self._fixed["floors", config] = whole.sharing(config=config).floors

    def of_layer(self, config: SparseConfig) -> Plan:
        """The plan under a layer's budgets."""
        if config not in self._budgets:
            whole = self._whole.sharing(config=config)
            heads = len(config.ratio_table[Modality.TEXT])
            # Written to in every mode of autograd.
            with torch.inference_mode(False):
                shape = (len(self.place), heads, 1)
                budget = torch.zeros(shape, dtype=torch.int64, device=self.place.device)
            # Rounding of a shorter sequence may go the other way; another one may be cut finer.
            width = min(whole.max_kept + whole.max_kept // 8 + 8, self._table.shape[1])
            self._budgets[config], self._widths[config] = budget, width
            self._of_config(whole, config)
            self._fixed |= {("head_budget", config): budget, ("max_kept", config): width}
            self._fixed["budget", config] = budget[:, 0]
            self._write_budget(config, budget)
            self.forget_step()
        return self.plan.sharing(config=config)

    def hides_alike(self, padding: Tensor, tokens: int) -> bool:
        """Whether a mask, (B or 1, at least M) bool, hides the tokens that the layout hides."""
        known = self._whole.layout.document[:, :tokens] >= 0
        return padding.shape[1] >= tokens and bool((padding[:, :tokens] == known).all())

    def full(self, tokens: int) -> bool:
        """Whether there is no room for so many tokens."""
        return tokens > self.capacity

    def advance(self, tokens: int) -> None:
        """Write down a step: M tokens, of which the query is the last one.

        Raises:
            ValueError: there is no room for so many.
        """
        if not 0 < tokens <= self.capacity:
            raise ValueError(f"tokens must be from 1 to {self.capacity}, got {tokens}")
        end = self._last.new_full((), tokens)
        if tokens != self.tokens + 1:
            self._write_units(end)
        self._write_step(end, ANY_MODALITY if tokens <= self._known else TEXT_ALONE)
        self.tokens = tokens

    def advance_to(self, end: Tensor) -> None:
        """The same of a number of tokens that the device knows, () int64.

        It must be one more than in the step before, or `advance` must have come before, and more
        than the layout has. The host does not learn of it.
        """
        self._write_step(end, TEXT_ALONE)
        self.tokens = 0

    def _write_units(self, end: Tensor) -> None:
        start, size = self._table.long().unbind(-1)
        low = start.minimum(end)
        self._units.copy_(torch.stack([low, (start + size).minimum(end) - low], -1))

    def _write_step(self, end: Tensor, newest_modality: frozenset[int]) -> None:
        self.newest.memo["modalities"] = newest_modality
        newest = (end - 1).expand(len(self.place), 1)
        last = self._unit_of.gather(1, newest)
        self._last.copy_(last)
        pair = last[..., None].expand(-1, -1, 2)
        start = self._table.gather(1, pair)[..., 0]
        unit = torch.stack([start, end - start], -1).to(torch.int32)
        self._units.scatter_(1, pair, unit)
        self.newest.units.copy_(unit)
        self.newest.unit_modality.copy_(self._kind.gather(1, last))
        self._span[..., 1] = end
        self.place[..., 0] = end - 1
        if self.config.window:
            self._window[..., 0] = (end - self.config.window).clamp(min=0)
            self._window[..., 1] = end
        self._visible_tokens.copy_(self._before.gather(1, last) + unit[..., 1])
        for config, budget in self._budgets.items():
            self._write_budget(config, budget)
        self.forget_step()

    def forget_step(self) -> None:
        """Drop what was computed of a step: it is not true of the next one."""
        self.plan.memo.clear()
        self.plan.memo.update(self._fixed)

    def _write_budget(self, config: SparseConfig, budget: Tensor) -> None:
        keys = self._visible_tokens[:, None]  # (B, 1, 1)
        if config.tokens is not None:
            budget.copy_(keys.clamp(max=config.tokens).expand_as(budget))
            return
        first, *others = config.ratio_table[Modality.TEXT]
        ratios = self._ratios(config) if others else first
        budget.copy_((keys * ratios).round().long().clamp(min=1).minimum(keys))

    def _ratios(self, config: SparseConfig) -> Tensor:
        key = "ratios", config
        if key not in self._fixed:
            ratios = torch.tensor(config.ratio_table[Modality.TEXT], device=self.place.device)
            self._fixed[key] = ratios[None, :, None]
        return self._fixed[key]


def _with_text_to_come(layout: TokenLayout, capacity: int) -> TokenLayout:
    """The layout with text behind it, of the document that each row ends with."""
    more = capacity - layout.length
    if more <= 0:
        return replace(layout, span=None, grids=(), order=None, memo={})
    shape = (layout.batch, more)
    kinds = layout.modality.new_full(shape, int(Modality.TEXT))
    last = layout.document.amax(1, keepdim=True).clamp(min=0).expand(shape)
    # Text behind text of the same document is one segment with it.
    on = (layout.modality[:, -1:] == int(Modality.TEXT)) & (layout.document[:, -1:] >= 0)
    segment = layout.segment[:, -1:] + (~on).to(layout.segment.dtype)
    return TokenLayout(
        torch.cat([layout.modality, kinds], 1),
        torch.cat([layout.segment, segment.expand(shape)], 1),
        torch.cat([layout.document, last.to(layout.document.dtype)], 1),
    )


class UnitDescriptors(DescriptorCache):
    """Descriptors of all units of a geometry, of which a step makes those of the newest anew."""

    def __init__(self, geometry: DecodingGeometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.table: Tensor | None = None
        """(B, K, U, ...)."""
        self.stale = True
        """Whether the next call describes all units."""
        self._written = 0
        """`written` of the geometry when all were described."""

    def update(self, k: Tensor, plan: Plan, describe: Callable[[Plan], Tensor]) -> Tensor:
        geometry = self.geometry
        if self.stale or self.table is None or self._written != geometry.written:
            made = describe(plan)
            if self.table is None or self.table.shape != made.shape:
                # Made to be written to in every mode of autograd.
                with torch.inference_mode(False):
                    self.table = torch.empty_like(made, memory_format=torch.contiguous_format)
            # A graph that was recorded reads it where it is.
            self.table.copy_(made)
            self.stale, self._written = False, geometry.written
            return self.table
        new = describe(geometry.newest)
        place = geometry._last.view(-1, 1, 1, *(1,) * (new.dim() - 3))
        return self.table.scatter_(2, place.expand_as(new), new.to(self.table.dtype))


class LayerDecoding:
    """What one layer keeps between steps.

    Args:
        geometry: that of the keys.
        config: the layer's own.
        scorer: the layer's own; one for which `decodes_in_place` knows no reason against.
    """

    def __init__(self, geometry: DecodingGeometry, config: SparseConfig, scorer: Scorer) -> None:
        self.geometry, self.config, self.scorer = geometry, config, scorer
        self.descriptors = UnitDescriptors(geometry)
        self.weights: Any = None
        """State of the scorer's weights when a graph was prepared."""
        self.keys: Any = None
        """A weak reference to the keys of the static cache that it was prepared for."""

    def describe(self, q: Tensor, k: Tensor, scale: float) -> None:
        """Describe all units, before steps that the host does not see."""
        plan = self.geometry.of_layer(self.config)
        self.descriptors.stale = True
        self.scorer.score_step(q, k, plan, plan, scale, self.descriptors)

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Selection]:
        """Attention of the newest token, (B, H, 1, D), and what it kept.

        Args:
            q: (B, H, 1, D).
            k, v: (B, K, at least M, D).
        """
        plan = self.geometry.of_layer(self.config)
        placed = plan.sharing(tiles=self.geometry.place)
        scores = self.scorer.score_step(q, k, plan, placed, scale, self.descriptors)
        index, count = topk_lists(scores, plan)
        selection = Selection(index, count, plan)
        return attend_selection(q, k, v, selection, scale), selection

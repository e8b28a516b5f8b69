"""Steps of decoding whose work does not grow with the context: geometry is written in place.

A sequence that grows by a token changes a few numbers: where it ends, the unit that the token falls
into, and the budgets. They lie in tensors of their own, of a size for the tokens to come, so that a
step makes no layout and no plan, waits for nothing, and can be recorded in a CUDA graph.

B batch, H query heads, K KV heads, M key tokens so far, C key tokens at most, U units, D head dim
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mm_sparse.attention.selected import attend_selection
from mm_sparse.config import SparseConfig
from mm_sparse.layout import Plan, TokenLayout
from mm_sparse.modality import Modality
from mm_sparse.scorers import DescriptorCache, Scorer
from mm_sparse.selection import Selection, topk_lists

# Tokens to come that a growing cache gets room for, beside an eighth of what is there.
SPARE_TOKENS = 2048


def decodes_in_place(config: SparseConfig, scorer: Scorer) -> str | None:
    """Why steps under a config and with a scorer need plans of their own; None if they do not."""
    if config.top_p is not None:
        return "top_p"
    if config.sample_ratio:
        return "sample_ratio"
    if config.coarse_factor > 1:
        return "coarse_factor"
    if type(scorer).forward is not Scorer.forward or type(scorer).score is not Scorer.score:
        return f"{type(scorer).__name__} writes forward or score itself"
    if scorer._forward_hooks or scorer._forward_pre_hooks:
        return "the scorer has hooks"
    return None


class DecodingGeometry:
    """Tiles, units and budgets of a step with one query a row, for layers that see the same keys.

    Args:
        layout: of the M tokens before the step and of those of the step itself.
        config: whose tiles, units, sinks and window hold.
        group: query heads of a KV head.
        kv_heads: K.
        capacity: C, from M on.
    """

    def __init__(
        self, layout: TokenLayout, config: SparseConfig, group: int, kv_heads: int, capacity: int
    ) -> None:
        self.capacity, self.config, self.kv_heads = capacity, config, kv_heads
        self.layout = _with_text_to_come(layout, capacity)
        whole = self.layout.new_plan(config, group, 1, capacity - 1)
        self.tokens = 0
        """M of the step that is written down now; 0 before the first."""
        self.low = 0
        """First key that its query sees."""
        device, batch = layout.device, layout.batch
        self._table = whole.units
        """(B, U, 2): units as they are once all tokens are there."""
        ends = self._table.long().sum(-1)
        filler = self._table[..., 1] == 0
        position = torch.arange(capacity, device=device).expand(batch, -1).contiguous()
        self._unit_of = torch.searchsorted(
            ends.masked_fill(filler, capacity + 1).contiguous(), position, right=True
        ).to(torch.int32)
        """(B, C): the unit of each token; of padding, the next one."""
        self._before = torch.nn.functional.pad(self._table[..., 1].long().cumsum(1), (1, 0))
        """(B, U + 1): tokens of the units before each."""
        self._whole = whole
        units = torch.zeros_like(self._table)
        number = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._last = number
        """(B, 1): the unit that the newest token is in."""
        span = torch.zeros(batch, 1, 2, dtype=torch.int32, device=device)
        self._visible_tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._window = torch.zeros_like(span)
        self.place = torch.tensor([0, 1], dtype=torch.int32, device=device).repeat(batch, 1, 1)
        """(B, 1, 2): the position of the query and how many there are, for distances."""
        self.plan = replace(
            whole, query_offset=0, units=units, span=span, tile_span=span, unit_offset=-1,
            tile_modality=torch.full_like(whole.tile_modality, int(Modality.TEXT)),
        )  # fmt: skip
        self.newest = replace(
            self.plan, units=torch.zeros(batch, 1, 2, dtype=torch.int32, device=device),
            unit_modality=torch.zeros(batch, 1, dtype=torch.int8, device=device),
        )  # fmt: skip
        """The plan of the newest unit alone."""
        self._fixed: dict[Any, Any] = {
            ("sinks", config.sinks): whole.sink_units,
            ("near", config.window): self._window,
            "modalities": whole.modalities | {int(Modality.TEXT)},
            "visible_tokens": self._visible_tokens,
            **{(name, c): x for (name, c), x in self._of_config(whole, config).items()},
        }
        self._budgets: dict[SparseConfig, Tensor] = {}
        self._fix()
        self.newest.memo["modalities"] = self._fixed["modalities"]

    @staticmethod
    def _of_config(whole: Plan, config: SparseConfig) -> dict[Any, Any]:
        return {
            ("live_query_pools", config): whole.live_query_pools,
            ("floors", config): whole.floors,
        }

    def _fix(self) -> None:
        # What was computed of the step before is not true of this one.
        self.plan.memo.clear()
        self.plan.memo.update(self._fixed)

    def of_layer(self, config: SparseConfig) -> Plan:
        """The plan under a layer's budgets."""
        if config not in self._budgets:
            whole = self._whole.sharing(config=config)
            heads = len(config.head_ratio) or 1
            budget = self._visible_tokens.new_zeros(len(self.place), heads, 1)
            self._budgets[config] = budget
            # One more than the whole keeps: rounding of a shorter sequence may go the other way.
            most = min(whole.max_kept + 1, self._table.shape[1])
            self._fixed |= self._of_config(whole, config)
            self._fixed |= {("head_budget", config): budget, ("max_kept", config): most}
            self._fixed["budget", config] = budget[:, 0]
            self._write_budget(config, budget)
            self._fix()
        return self.plan.sharing(config=config)

    def full(self, tokens: int) -> bool:
        """Whether there is no room for so many tokens."""
        return tokens > self.capacity

    def advance(self, tokens: int, low: int = 0) -> None:
        """Write down a step: M tokens, of which the query, the last one, sees those from `low` on.

        Raises:
            ValueError: there is no room for so many.
        """
        if not 0 < tokens <= self.capacity:
            raise ValueError(f"tokens must be from 1 to {self.capacity}, got {tokens}")
        last = self._unit_of[:, tokens - 1 : tokens].long()
        if self.tokens == 0 or tokens != self.tokens + 1:
            self._write_units(tokens)
        self.tokens, self.low = tokens, low
        self._last.copy_(last)
        pair = last[..., None].expand(-1, -1, 2)
        unit = self._table.gather(1, pair)
        unit[..., 1] = tokens - unit[..., 0]
        self.plan.units.scatter_(1, pair, unit)
        self.newest.units.copy_(unit)
        self.newest.unit_modality.copy_(self._whole.unit_modality.gather(1, last))
        span = self.plan.span
        span[..., 0] = low
        span[..., 1] = tokens
        self.place[..., 0] = tokens - 1
        window = self.config.window
        if window:
            self._window[..., 0] = max(tokens - 1 - window + 1, low)
            self._window[..., 1] = tokens
        first = self._unit_of[:, low : low + 1].long()
        seen = self._before.gather(1, last) - self._before.gather(1, first.minimum(last))
        self._visible_tokens.copy_(seen + unit[..., 1])
        for config, budget in self._budgets.items():
            self._write_budget(config, budget)
        self._fix()

    def _write_units(self, tokens: int) -> None:
        start, size = self._table.unbind(-1)
        self.plan.units[..., 0] = start.clamp(max=tokens)
        self.plan.units[..., 1] = (start + size).clamp(max=tokens) - start.clamp(max=tokens)

    def _write_budget(self, config: SparseConfig, budget: Tensor) -> None:
        keys = self._visible_tokens[:, None]  # (B, 1, 1)
        if config.tokens is not None:
            budget.copy_(keys.clamp(max=config.tokens).expand_as(budget))
            return
        ratios: Any = config.ratio
        if config.head_ratio:
            ratios = self._ratios(config)
        budget.copy_((keys * ratios).round().long().clamp(min=1).minimum(keys))

    def _ratios(self, config: SparseConfig) -> Tensor:
        key = "ratios", config
        if key not in self._fixed:
            ratios = torch.tensor(config.head_ratio, device=self.place.device)
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


class _UnitDescriptors(DescriptorCache):
    """Descriptors of all units of a geometry, of which a step makes those of the newest anew."""

    def __init__(self, geometry: DecodingGeometry) -> None:
        self.geometry, self.table = geometry, torch.empty(0)
        self.described = 0
        """Tokens that are described."""

    def update(self, k: Tensor, plan: Plan, describe: Callable[[Plan], Tensor]) -> Tensor:
        geometry = self.geometry
        if self.described != geometry.tokens - 1:
            self.table = describe(plan).clone()
        else:
            new = describe(geometry.newest)
            place = geometry._last.view(-1, 1, 1, *(1,) * (new.dim() - 3))
            self.table.scatter_(2, place.expand_as(new), new.to(self.table.dtype))
        self.described = geometry.tokens
        return self.table


@dataclass
class LayerDecoding:
    """What one layer keeps between steps."""

    geometry: DecodingGeometry
    config: SparseConfig
    """The layer's own."""
    scorer: Scorer

    def __post_init__(self) -> None:
        self.descriptors = _UnitDescriptors(self.geometry)

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


def capacity_for(tokens: int) -> int:
    """Room for a cache that grows: whole pages, so that it is made anew seldom."""
    return math.ceil((tokens + tokens // 8 + 1) / SPARE_TOKENS) * SPARE_TOKENS

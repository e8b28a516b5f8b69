"""Tiles and units of a layout, what they can see, what is always kept, and how much may be kept.

B batch, N query tokens, M key tokens, T tiles, U units, P pieces (tiles or units)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from mm_sparse.config import SparseConfig
from mm_sparse.kernels.block_lists import BlockLists
from mm_sparse.kernels.sizes import all_whole
from mm_sparse.layout.memo import memo_by_blocks, memo_by_config
from mm_sparse.layout.partition import fill_documents, piece_edges, sum_between, token_budget
from mm_sparse.modality import Modality

if TYPE_CHECKING:
    from mm_sparse.layout.token_layout import TokenLayout

R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Plan:
    """Geometry that scorers, selection and kernels share; made by `TokenLayout.plan`."""

    layout: TokenLayout
    config: SparseConfig
    group: int
    """Query heads of a KV head."""
    num_queries: int
    query_offset: int
    tile_tokens: int
    """Most query tokens in a tile."""
    tiles: Tensor
    """(B, T, 2) int32: first query token, counted from `query_offset`, and length (0 is filler)."""
    units: Tensor
    """(B, U, 2) int32: first key token and length; padding belongs to no unit."""
    span: Tensor
    """(B, N, 2) int32: half-open range of keys that each query sees."""
    tile_span: Tensor
    """(B, T, 2) int32: range of keys that some query of the tile sees."""
    tile_modality: Tensor
    """(B, T) int8, the most frequent in the tile; -1 without a valid token."""
    unit_modality: Tensor
    """(B, U) int8."""
    unit_offset: int
    """If not -1, unit u is what exists of the `unit` keys from u * unit - lead on."""
    tile_offset: int
    """The same of tiles and queries."""
    units_per_run: int = 1
    """Units of the layout that a unit of this plan is (`mm_sparse.scorers.two_stage`)."""
    memo: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)
    """What was computed of the blocks; `replace`, which may change them, starts anew."""

    @property
    def deterministic(self) -> bool:
        """Whether gradients repeat bit for bit: as the config says, else where heads share none."""
        asked = self.config.deterministic
        return self.group == 1 if asked is None else asked

    @property
    def unit(self) -> int:
        """Most key tokens in a unit."""
        return self.config.unit * self.units_per_run

    @property
    def regular(self) -> bool:
        """Whether unit u is exactly the keys [u * unit, (u + 1) * unit)."""
        return all_whole(self.unit_offset, self.unit, self.layout.length)

    @property
    def regular_tiles(self) -> bool:
        """Whether tile t is exactly the queries [t * tile_tokens, (t + 1) * tile_tokens)."""
        return all_whole(self.tile_offset, self.tile_tokens, self.num_queries)

    def sharing(self, **changes: Any) -> Plan:
        """The same pieces with another budget; what is memoised is shared."""
        made = replace(self, **changes)
        object.__setattr__(made, "memo", self.memo)
        return made

    def block_lists(self, index: Tensor, count: Tensor) -> BlockLists:
        """Lists of units (B, K, T, L), with this geometry, as kernels are given them."""
        return BlockLists(
            self.tiles, self.units, self.span, index, count, self.tile_tokens, self.unit,
            self.unit_offset, self.tile_offset,
        )  # fmt: skip

    def select_tiles(self, tiles: slice | Tensor, queries: slice | None = None) -> Plan:
        """The plan of some of its tiles; what is known of units alone goes along.

        If these are the tiles of a run of `queries`, it has no others.
        """
        table = self.tiles[:, tiles].clone()
        # Without their run, they are not one behind the other.
        changes: dict[str, Any] = {"tile_offset": -1}
        if queries is not None:
            table[..., 0] -= queries.start
            # What begins behind the first tile begins with a whole one.
            changes = {
                "tile_offset": min(self.tile_offset, 0) if queries.start else self.tile_offset,
                "num_queries": queries.stop - queries.start,
                "query_offset": self.query_offset + queries.start,
                "span": self.span[:, queries].contiguous(),
            }
        return self._with_tiles(
            tiles=table,
            tile_span=self.tile_span[:, tiles].contiguous(),
            tile_modality=self.tile_modality[:, tiles].contiguous(),
            **changes,
        )

    def of_tiles(self, index: Tensor) -> Plan:
        """The plan of some tiles of each row, which stand anywhere and may stand there twice.

        Args:
            index: (B, t) int64, numbers of tiles.
        """

        def pick(x: Tensor) -> Tensor:
            return x.gather(1, index[(...,) + (None,) * (x.dim() - 2)].expand(-1, -1, *x.shape[2:]))

        tables = (self.tiles, self.tile_span, self.tile_modality)
        tiles, tile_span, tile_modality = (pick(x) for x in tables)
        return self._with_tiles(
            tiles=tiles, tile_span=tile_span, tile_modality=tile_modality, tile_offset=-1
        )

    def _with_tiles(self, **changes: Any) -> Plan:
        """The plan with other tiles; what is known of units alone goes along."""
        part = replace(self, **changes)
        part.memo["modalities"] = self.modalities
        if self.config.sinks:
            part.memo["sinks", self.config.sinks] = self.sink_units
        return part

    def memoize(self, name: Hashable, find: Callable[[], R]) -> R:
        """What `find` gave the first time that a plan of these pieces asked for `name`."""
        if name not in self.memo:
            self.memo[name] = find()
        return self.memo[name]

    @memo_by_blocks
    def visible(self) -> Tensor:
        """(B, T, U) bool: some query of the tile sees some key of the unit."""
        return self._overlap(self.tile_span)

    @property
    def always(self) -> Tensor:
        """(B, T, U) bool: kept whatever the scores say (sinks of the document, local window)."""
        config = self.config
        return self.memoize(("always", config.sinks, config.window), self._always)

    def _always(self) -> Tensor:
        kept = self._overlap(self.window_span)
        # A tile of short documents has sinks in each of them, so units are asked, not tiles.
        return (kept | self.sink_units[:, None]) & self.visible if self.config.sinks else kept

    @property
    def window_span(self) -> Tensor:
        """(B, T, 2) int32: range of keys whose units are kept for being near to the tile."""
        return self.memoize(("near", self.config.window), self._window_span)

    def _window_span(self) -> Tensor:
        window = self.config.window
        if not window:
            return torch.zeros_like(self.tile_span)
        first = self.tiles[..., 0] + self.query_offset
        last = first + self.tiles[..., 1]
        low, high = self.tile_span.unbind(-1)
        sees_ahead = high > last
        behind = torch.where(sees_ahead, window // 2, window)
        low = (first - behind + ~sees_ahead).maximum(low)
        high = torch.where(sees_ahead, last + window // 2, last).minimum(high)
        return torch.stack([low, high], -1)

    @property
    def sink_units(self) -> Tensor:
        """(B, U) bool: units with one of the first `sinks` tokens of a document."""
        return self.memoize(("sinks", self.config.sinks), self._sink_units)

    def _sink_units(self) -> Tensor:
        if not self.config.sinks:
            return torch.zeros_like(self.unit_modality, dtype=torch.bool)
        start, _ = piece_edges(fill_documents(self.layout.document))
        position = torch.arange(self.layout.length, device=start.device)
        sink = (position - start < self.config.sinks) & self.layout.valid
        before = torch.nn.functional.pad(sink.cumsum(1), (1, 0))
        edges = self.units.long().cumsum(-1).unbind(-1)
        return before.gather(1, edges[1]) > before.gather(1, edges[0])

    @memo_by_config
    def open_units(self) -> Tensor:
        """(B, T) int64: visible units that are not kept anyway, which a tile chooses among."""
        visible, window = self.units_of(self.tile_span), self.units_of(self.window_span)
        return (visible[1] - visible[0]) - self._units_kept(visible, window)

    def _units_kept(self, visible: tuple[Tensor, Tensor], window: tuple[Tensor, Tensor]) -> Tensor:
        """(B, T): units always kept, of the first units and ends of what is seen and near."""
        kept = window[1] - window[0]
        if not self.config.sinks:
            return kept
        sinks = sum_between(self.sink_units, *visible) - sum_between(self.sink_units, *window)
        return kept + sinks

    @memo_by_config
    def budget(self) -> Tensor:
        """(B, T) int64: key tokens that a tile may keep, what is always kept included."""
        config, visible_tokens = self.config, self.visible_tokens
        if config.top_p is not None:
            return visible_tokens
        if config.tokens is not None:
            return visible_tokens.clamp(max=config.tokens)
        if config.query_ratio:
            return token_budget(visible_tokens, self._tile_ratios().mean(1))
        return token_budget(visible_tokens, config.ratio)

    @memo_by_config
    def head_budget(self) -> Tensor:
        """(B, K, T) int64: the same by KV head, or (B, 1, T) where heads have no ratios."""
        config = self.config
        if config.top_p is not None or config.tokens is not None:
            return self.budget[:, None]
        if config.query_ratio:
            return token_budget(self.visible_tokens[:, None], self._tile_ratios())
        if not config.head_ratio:
            return self.budget[:, None]
        ratios = torch.tensor(config.head_ratio, device=self.units.device)
        return token_budget(self.visible_tokens[:, None], ratios[:, None])

    @memo_by_blocks
    def query_modality(self) -> Tensor:
        """(B, T) int8: whose ratio a tile has, TEXT if it holds any, else `tile_modality`.

        Short segments share tiles, and a few words that ask a question must not be short of keys
        for a sound that is longer.
        """
        queries = slice(self.query_offset, self.query_offset + self.num_queries)
        text = (self.layout.modality == int(Modality.TEXT)) & self.layout.valid
        before = torch.nn.functional.pad(text[:, queries].cumsum(1), (1, 0))
        first, end = self.tiles.long().cumsum(-1).unbind(-1)
        holds = before.gather(1, end) > before.gather(1, first)
        return torch.where(holds, int(Modality.TEXT), self.tile_modality).to(torch.int8)

    def _tile_ratios(self) -> Tensor:
        """(B, K or 1, T) float32: those of no modality where a tile has none, -1."""
        table = torch.tensor(self.config.ratio_table, device=self.units.device)
        # Kernels read budgets row by row.
        return table[self.query_modality.long()].transpose(1, 2).contiguous()

    @memo_by_blocks
    def visible_tokens(self) -> Tensor:
        """(B, T) int64: keys of visible units."""
        return sum_between(self.units[..., 1], *self.units_of(self.tile_span))

    def units_of(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """First unit and end of those that hold a key of the ranges (B, T, 2): two (B, T)."""
        starts, ends = self._edges
        low, high = (x.contiguous() for x in keys.unbind(-1))
        first = torch.searchsorted(ends, low, right=True)
        return first, torch.searchsorted(starts, high).maximum(first)

    @memo_by_blocks
    def _edges(self) -> tuple[Tensor, Tensor]:
        """Starts and ends of units, ascending: two (B, U) int32; fillers are behind all keys."""
        start, size = self.units.unbind(-1)
        filler = (size == 0) * torch.iinfo(torch.int32).max
        return start.maximum(filler), (start + size).maximum(filler)

    @cached_property
    def without_sample(self) -> Plan:
        """The same pieces with what is left of the budget for the best units (`sampled`)."""
        if not self.config.sample_ratio:
            return self
        return self.sharing(config=self.config.for_best())

    @memo_by_config
    def max_kept(self) -> int:
        """No tile keeps more units than this."""
        config, num_units = self.config, self.units.shape[1]
        if config.top_p is not None or not self.tiles.shape[1] or not num_units:
            return num_units
        visible_tokens, short, always = self.memoize(
            ("most", config.sinks, config.window), self._most
        )
        budget = visible_tokens if config.tokens is None else min(visible_tokens, config.tokens)
        if config.tokens is None:
            # Rounding in float32 may go the other way than here: one more than it can be.
            budget = min(int(visible_tokens * config.largest_ratio) + 1, visible_tokens)
        if floors := config.floors():
            # Each rounds up to a unit, and all may lie outside of what is always kept.
            always += int(budget * sum(floors.values()) / self.unit) + short + len(floors)
        return min(num_units, max(budget // self.unit + 1 + short, always))

    def _most(self) -> tuple[int, int, int]:
        """Over tiles: most keys seen, short units seen, units always kept."""
        if not self.tiles.numel():
            return 0, 0, 0
        visible_tokens, window_span = self.units_of(self.tile_span), self.units_of(self.window_span)
        short = sum_between(self.units[..., 1] < self.unit, *visible_tokens)
        always = self._units_kept(visible_tokens, window_span)
        counts = (self.visible_tokens, short, always)
        return tuple(torch.stack([x.amax() for x in counts]).tolist())

    @memo_by_blocks
    def tile_of(self) -> Tensor:
        """(B, N) int64: the tile that a query is in."""
        position = torch.arange(self.num_queries, device=self.tiles.device)
        # Tiles follow one another, fillers without a token go last.
        start = self.tiles[..., 0].masked_fill(self.tiles[..., 1] == 0, self.num_queries)
        position = position.expand(len(start), -1).contiguous()
        return torch.searchsorted(start.long().contiguous(), position, right=True) - 1

    @memo_by_blocks
    def members(self) -> Tensor:
        """(B, T) int64: queries of a tile that see a key."""
        keys = torch.nn.functional.pad(self.layout.valid.cumsum(1), (1, 0))
        low, high = self.span.long().unbind(-1)
        live = keys.gather(1, high) > keys.gather(1, low)
        before = torch.nn.functional.pad(live.cumsum(1), (1, 0))
        edges = self.tiles.long().cumsum(-1).unbind(-1)
        return before.gather(1, edges[1]) - before.gather(1, edges[0])

    @memo_by_blocks
    def modalities(self) -> frozenset[int]:
        """Of tiles and units; pieces without a valid token have none."""
        kinds = torch.cat([self.tile_modality.flatten(), self.unit_modality.flatten()])
        return frozenset(kinds.unique().tolist()) - {-1}

    @memo_by_blocks
    def tile_modalities(self) -> frozenset[int]:
        """Of tiles, and maybe others: what is known without another wait for the device."""
        return self.modalities

    @memo_by_config
    def live_query_pools(self) -> Tensor:
        """(B, T, S) bool: which query pools of a tile hold a token; a short one lacks the last."""
        parts = min(self.config.query_pools, self.tile_tokens)
        width = -(-self.tile_tokens // parts)
        first = torch.arange(0, parts * width, width, device=self.tiles.device)
        return first < self.tiles[..., 1:]

    @memo_by_config
    def floors(self) -> Tensor | None:
        """(modalities,) float32: least share of the budget; None where nobody has one."""
        shares = self.config.floors()
        shares_by_modality = [shares.get(kind, 0.0) for kind in Modality]
        return torch.tensor(shares_by_modality, device=self.units.device) if shares else None

    @memo_by_blocks
    def distance(self) -> Tensor:
        """(B, T, U) int32: key tokens from the middle of a tile to the middle of a unit, signed."""
        tile = self.tiles[..., 0] + self.query_offset + self.tiles[..., 1] // 2
        unit = self.units[..., 0] + self.units[..., 1] // 2
        return tile[:, :, None] - unit[:, None]

    def _overlap(self, keys: Tensor) -> Tensor:
        start, size = self.units[:, None].unbind(-1)
        return (start < keys[..., 1:]) & (start + size > keys[..., :1]) & (size > 0)

"""What the tokens of an engine's step see and may keep, where sequences lie in pages.

An engine serves many sequences at once: steps of decoding, and chunks of prompts. Tokens of all of
them lie one behind the other; keys lie in pages of one memory. Units are the runs of `unit` tokens
of a sequence, whatever they are of, so that a page holds whole units and every sequence that shares
the page shares them.

N tokens of a step, R sequences of a step, P pages of a sequence, A pages in memory, T tiles,
U units
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mm_sparse.attention.decoding import decodes_in_place
from mm_sparse.attention.dense import dense_length
from mm_sparse.config import SparseConfig
from mm_sparse.layout import Plan
from mm_sparse.modality import Modality
from mm_sparse.scorers import Scorer

TEXT = int(Modality.TEXT)


def serves_pages(config: SparseConfig, scorer: Scorer, page: int) -> str | None:
    """Why a config and a scorer cannot serve pages of so many tokens; None if they can."""
    if not config.causal:
        return "causal is False"
    if page % config.unit:
        return f"pages of {page} tokens do not hold whole units of {config.unit}"
    if not scorer.describes:
        return f"{type(scorer).__name__} describes no units"
    return decodes_in_place(config, scorer)


@dataclass(frozen=True)
class PagedTokens:
    """The keys of a plan, of which no layout is needed."""

    batch: int
    length: int


@dataclass(frozen=True)
class PagedRows:
    """Sequences of a step that are scored and attended in one call."""

    queries: slice
    """Their tokens among those of the step, as many for each sequence."""
    tiles: slice
    """Their tiles among those of the step."""
    plan: Plan
    placed: Plan
    """The same with tiles where they stand among the keys."""
    table: Tensor
    """(B, P) int32."""


@dataclass(frozen=True)
class PagedStep:
    """One step of an engine."""

    rows: list[PagedRows]
    """Sequences that run sparse."""
    dense: list[slice]
    """Runs of sequences that are too short to gain from it."""
    tiles: Tensor
    """(1, T, 2) int32: of all sequences, in the order of the tokens of the step."""
    tile_modality: Tensor
    """(1, T) int8."""
    page: Tensor
    """(n,) int64: pages of the units that the step's tokens fall into."""
    number: Tensor
    """(n,) int64: which unit of its page each is."""
    size: Tensor
    """(n,) int64: tokens that it holds; 0 of sequences that are there to fill a batch."""
    unit_modality: Tensor
    """(1, n) int8."""
    decoding: bool
    """Whether all sequences are steps of decoding, which later steps overwrite in place."""
    memo: dict[Any, Any] = field(default_factory=dict)


class PagedGeometry:
    """Tiles, units and budgets of steps, for layers that share pages.

    Steps of decoding alone write to the same memory each time, so that a CUDA graph that was
    recorded with one step serves the next.

    Args:
        configs: of the layers, which differ in ratios alone.
        group: query heads of a KV head.
        page: tokens of a page.
        rows: most sequences of a step.
        pages: P, of the longest sequence.
        memory: A.
        device: of the step's tensors.
    Raises:
        ValueError: configs that do not fit each other or the pages, or sizes below 1.
    """

    def __init__(
        self, configs: Sequence[SparseConfig], *, group: int, page: int, rows: int, pages: int,
        memory: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.configs = tuple(dict.fromkeys(configs))
        if not self.configs:
            raise ValueError("configs must hold those of the layers, got none")
        self.config = self.configs[0]
        sizes = {"group": group, "page": page, "rows": rows, "pages": pages, "memory": memory}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if len({_without_ratios(config) for config in self.configs}) > 1:
            raise ValueError("configs must differ in ratios alone, got others")
        if len(by_head := frozenset().union(*(x.head_counts for x in self.configs))) > 1:
            raise ValueError(f"configs must be for as many KV heads, got {sorted(by_head)}")
        if page % self.config.unit:
            raise ValueError(
                f"page must hold whole units of {self.config.unit} tokens, got {page} tokens"
            )
        self.group, self.device = group, device
        self.unit, self.units_of_page = self.config.unit, page // self.config.unit
        self.tile_tokens = max(self.config.tile // group, 1)
        self.capacity, self.memory = pages * page, memory
        self.least = dense_length(self.config, device, "call")
        self.least_of_step = dense_length(self.config, device, "step")
        self.modality = torch.full(
            (memory, self.units_of_page), TEXT, dtype=torch.int8, device=device
        )
        """(A, units of a page): that of the first token of every unit in memory."""
        self.kinds = frozenset({TEXT})
        """Modalities that there have been."""
        num_units = pages * self.units_of_page

        def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self._first = torch.arange(num_units, device=device, dtype=torch.int32) * self.unit
        self._sinks = (self._first < self.config.sinks)[None]
        self._units, self._span = new(rows, num_units, 2), new(rows, 1, 2)
        self._window, self._place = new(rows, 1, 2), new(rows, 1, 2)
        self._place[..., 1] = 1
        self._kind = torch.full((rows, num_units), TEXT, dtype=torch.int8, device=device)
        self._tokens = new(rows, 1, dtype=torch.int64)
        # Of all configs at once: layers may have ratios of their own.
        # A step's token is text.
        rows_of = [config.ratio_table[TEXT] for config in self.configs]
        heads = max(map(len, rows_of))
        ratios = [own if len(own) > 1 else own * heads for own in rows_of]
        self._ratios = torch.tensor(ratios, device=device)[:, None]  # (configs, 1, heads)
        self._budgets = new(len(self.configs), rows, heads, dtype=torch.int64)
        self._page, self._number, self._size = (new(rows, dtype=torch.int64) for _ in range(3))
        self._newest = torch.full((1, rows), TEXT, dtype=torch.int8, device=device)
        self._places = torch.full((rows,), self.spare, device=device)
        self._in_memory: dict[int, Tensor] = {}
        """By stride of pages: (1, rows, 2) int32, newest units where they stand in memory."""
        tiles = torch.arange(rows, device=device, dtype=torch.int32)
        self._tiles = torch.stack([tiles, torch.ones_like(tiles)], -1)[None]
        self._plans: dict[int, tuple[Plan, Plan, dict[Any, Any]]] = {}

    @property
    def spare(self) -> int:
        """Where descriptors go that nobody reads: behind those of all units in memory."""
        return self.memory * self.units_of_page

    def step(
        self, starts: Sequence[int], lengths: Sequence[int], seq_lens: Tensor, table: Tensor, *,
        modality: Tensor | None = None, recorded: bool = False,
    ) -> PagedStep:  # fmt: skip
        """Write down a step; those of its sequences with one query that come first are decoding.

        Args:
            starts: R + 1 numbers, first token of each sequence's queries among the N of the step.
            lengths: at least the keys of each sequence, those of the step included; of sequences
                with more than one query exactly so many.
            seq_lens: (R,) the same on the device, exact; 0 of what only fills the batch.
            table: (R, P) int32, pages of each sequence; entries behind its end are not read.
            modality: (N,) int8 of the tokens, TEXT if None.
            recorded: whether a CUDA graph records the step, and will serve others: nothing is
                dense then for being short.
        Raises:
            ValueError: a sequence is too long, or numbers of tokens do not fit.
        """
        queries = [b - a for a, b in pairwise(starts)]
        if len(queries) != len(lengths) or min(queries, default=0) < 0:
            raise ValueError(
                f"starts must be ascending, one more than the {len(lengths)} lengths, got {starts}"
            )
        if modality is not None and len(modality) < starts[-1]:
            raise ValueError(
                f"modality must be of {starts[-1]} tokens of the step, got {len(modality)}"
            )
        ones = next((i for i, n in enumerate(queries) if n != 1), len(queries))
        if max(lengths, default=0) > self.capacity:
            raise ValueError(f"lengths must be at most {self.capacity} tokens, got {max(lengths)}")
        if modality is not None:
            self._note_modality(modality, starts, lengths, queries, table)
        rows: list[PagedRows] = []
        dense: list[slice] = []
        tiles, kinds = [self._tiles[0, :ones]], [self._newest[0, :ones].new_full((ones,), TEXT)]
        # Behind them may stand rows without a query, which fill the batch of a recorded step.
        filler = next((i for i, n in enumerate(queries[ones:]) if n), len(queries) - ones)
        if ones or filler:
            self._write_decoding(ones, ones + filler, seq_lens, table)
        if ones:
            if recorded or max(lengths[:ones]) >= self.least_of_step:
                plan, placed = self._decoding_plans(ones)
                rows.append(PagedRows(slice(0, ones), slice(0, ones), plan, placed, table[:ones]))
            else:
                dense.append(slice(0, ones))
        found = [(self._page[:ones], self._number[:ones], self._size[:ones])]
        at = ones
        for i in range(ones, len(queries)):
            if not queries[i]:
                continue
            first, length = lengths[i] - queries[i], lengths[i]
            if first < 0:
                raise ValueError(f"lengths must count the {queries[i]} queries, got {length}")
            own = self._runs(queries[i], starts[i])
            kind = asks = kinds[0].new_full((len(own),), TEXT)
            if modality is not None:
                kind = modality[own[:, 0].long()]
                asks = torch.where(_holds_text(modality, own), TEXT, kind).to(torch.int8)
            tiles.append(own)
            kinds.append(kind)
            found.append(self._touched(first, length, table[i]))
            run = slice(at, at + len(own))
            at = run.stop
            if length < self.least:
                first_of_run = dense.pop().start if dense and dense[-1].stop == i else i
                dense.append(slice(first_of_run, i + 1))
                continue
            plan, placed = self._chunk_plans(queries[i], first, length, table[i], kind, asks)
            rows.append(
                PagedRows(slice(starts[i], starts[i + 1]), run, plan, placed, table[i : i + 1])
            )
        page, number, size = (
            parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*found, strict=True)
        )
        newest = self._newest[:, :ones]
        if len(found) > 1:
            newest = self.modality[page, number][None]
        table_of_tiles = tiles[0] if len(tiles) == 1 else torch.cat(tiles)
        kind = kinds[0] if len(kinds) == 1 else torch.cat(kinds)
        only = len(found) == 1
        return PagedStep(
            rows, dense, table_of_tiles[None], kind[None], page, number, size, newest, only
        )

    def describing_plan(self, step: PagedStep, stride: int, config: SparseConfig) -> Plan:
        """All tiles of a step, and the units of its tokens where they stand in memory.

        Args:
            stride: units of memory from one page of keys to the next.
        """
        if stride not in step.memo:
            if step.decoding:
                if stride not in self._in_memory:
                    with torch.inference_mode(False):
                        shape = (1, len(self._page), 2)
                        self._in_memory[stride] = self._span.new_zeros(shape)
                    self._write_in_memory(stride)
                units = self._in_memory[stride][:, : len(step.page)]
            else:
                units = self._units_in_memory(step.page, step.number, step.size, stride)
            step.memo[stride] = self._plan(
                config, units=units, unit_modality=step.unit_modality, tiles=step.tiles,
                tile_modality=step.tile_modality, span=units.new_zeros(1, 0, 2),
                tile_span=torch.zeros_like(step.tiles), length=self.capacity, queries=0,
                offset=0, unit_offset=-1, tile_offset=-1,
            )  # fmt: skip
            step.memo[stride].memo["modalities"] = self.kinds
        return step.memo[stride].sharing(config=config)

    def places(self, step: PagedStep) -> Tensor:
        """(n,) int64: where descriptors of the units of a step's tokens go."""
        if step.decoding:
            return self._places[: len(step.page)]
        if "places" not in step.memo:
            place = step.page * self.units_of_page + step.number
            step.memo["places"] = torch.where(step.size > 0, place, self.spare)
        return step.memo["places"]

    def _units_in_memory(self, page: Tensor, number: Tensor, size: Tensor, stride: int) -> Tensor:
        """(1, n, 2) int32: first key and length of units where they stand in memory."""
        start = (page * stride + number) * self.unit * (size > 0)
        return torch.stack([start, size], -1).to(torch.int32)[None]

    def _write_in_memory(self, stride: int) -> None:
        """Write down where the newest units of sequences of one query stand."""
        found = self._units_in_memory(self._page, self._number, self._size, stride)
        self._in_memory[stride].copy_(found)

    def _note_modality(
        self, modality: Tensor, starts: Sequence[int], lengths: Sequence[int],
        queries: Sequence[int], table: Tensor,
    ) -> None:  # fmt: skip
        """Units take the modality of their first token."""
        self.kinds = frozenset(map(int, Modality))
        for i, count in enumerate(queries):
            first = lengths[i] - count
            begin = -(-first // self.unit) * self.unit
            if count < 2 or begin >= lengths[i]:
                continue
            number = torch.arange(begin // self.unit, -(-lengths[i] // self.unit)).to(self.device)
            page = table[i].long()[number // self.units_of_page]
            token = starts[i] + number * self.unit - first
            self.modality[page, number % self.units_of_page] = modality[token].to(torch.int8)

    def _runs(self, queries: int, first: int) -> Tensor:
        """(T, 2) int32: tiles of a chunk's queries, counted from `first`."""
        start = torch.arange(0, queries, self.tile_tokens, device=self.device, dtype=torch.int32)
        return torch.stack([start + first, (queries - start).clamp(max=self.tile_tokens)], -1)

    def _touched(self, first: int, length: int, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Page, number in it and size of the units that hold the tokens [first, length)."""
        unit = torch.arange(first // self.unit, -(-length // self.unit), device=self.device)
        page = table.long()[unit // self.units_of_page]
        size = (length - unit * self.unit).clamp(max=self.unit)
        return page, unit % self.units_of_page, size

    def _write_decoding(self, real: int, rows: int, seq_lens: Tensor, table: Tensor) -> None:
        """Write down what sequences of one query see; rows from `real` on only fill the batch."""
        # A graph of more rows than these must not find what they were in a step before.
        for x in (self._size, self._span, self._window, self._tokens):
            x[rows:] = 0
        self._budgets[:, rows:] = 0
        end = seq_lens[:rows].long().clone()
        end[real:] = 0
        unit = (end - 1).clamp(min=0) // self.unit
        page = table[:rows].long().gather(1, (unit // self.units_of_page)[:, None])[:, 0]
        # The table of what only fills the batch may hold anything.
        self._page[:rows] = page.clamp(0, self.memory - 1)
        self._number[:rows] = unit % self.units_of_page
        self._size[:rows] = end - unit * self.unit
        short = end.to(torch.int32)[:, None]
        start = self._first.minimum(short)
        place = self._page * self.units_of_page + self._number
        self._places.copy_(torch.where(self._size > 0, place, self.spare))
        for stride in self._in_memory:
            self._write_in_memory(stride)
        self._units[:rows, :, 0] = start
        self._units[:rows, :, 1] = (short - start).clamp(max=self.unit)
        self._span[:rows, 0, 1] = end
        self._place[:rows, 0, 0] = (end - 1).clamp(min=0)
        self._tokens[:rows, 0] = end
        if self.config.window:
            self._window[:rows, 0, 0] = (end - self.config.window).clamp(min=0)
            self._window[:rows, 0, 1] = end
        if len(self.kinds) > 1:
            self._kind[:rows] = self._kinds_of(table[:rows], self._first.shape[0])
            self._newest[0, :rows] = self.modality[self._page[:rows], self._number[:rows]]
        keys = end[:, None]
        if self.config.tokens is not None:
            wanted = keys.clamp(max=self.config.tokens)
        else:
            wanted = (keys * self._ratios).round().long().clamp(min=1).minimum(keys)
        # What is short keeps all: in a graph it cannot be dense.
        self._budgets[:, :rows] = torch.where(keys < self.least_of_step, keys, wanted)

    def _kinds_of(self, table: Tensor, num_units: int) -> Tensor:
        """(B, U) int8: modalities of the units of sequences."""
        pages = table[:, : -(-num_units // self.units_of_page)].long().clamp(0, self.memory - 1)
        return self.modality[pages].flatten(1)[:, :num_units]

    def _decoding_plans(self, rows: int) -> tuple[Plan, Plan]:
        """The plan of so many sequences of one query, on what was written down."""
        if rows not in self._plans:
            tiles = torch.zeros(rows, 1, 2, dtype=torch.int32, device=self.device)
            tiles[..., 1] = 1
            plan = self._plan(
                self.config, units=self._units[:rows], unit_modality=self._kind[:rows],
                tiles=tiles, tile_modality=self._newest[0, :rows, None].new_full((rows, 1), TEXT),
                span=self._span[:rows], tile_span=self._span[:rows], length=self.capacity,
                queries=1, offset=0, unit_offset=-1, tile_offset=-1,
            )  # fmt: skip
            pools = {config: plan.sharing(config=config) for config in self.configs}
            fixed: dict[Any, Any] = {
                ("sinks", self.config.sinks): self._sinks.expand(rows, -1).contiguous(),
                ("near", self.config.window): self._window[:rows],
                "visible_tokens": self._tokens[:rows],
            }
            for number, (config, own) in enumerate(pools.items()):
                budget = self._budgets[number, :rows, :, None]
                fixed |= {
                    ("head_budget", config): budget, ("budget", config): budget[:, 0],
                    ("max_kept", config): self._width(config),
                    ("live_query_pools", config): own.live_query_pools,
                    ("floors", config): own.floors,
                }  # fmt: skip
            self._plans[rows] = plan, plan.sharing(tiles=self._place[:rows]), fixed
        plan, placed, fixed = self._plans[rows]
        # What was computed of a step is not true of the next one.
        plan.memo.clear()
        plan.memo.update(fixed)
        plan.memo["modalities"] = self.kinds
        return plan, placed

    def _width(self, config: SparseConfig) -> int:
        """Most units that a step of decoding keeps."""
        most = self._most_kept(config, self.capacity)
        least = min(self.least_of_step, self.capacity)
        return max(most, math.ceil(least / self.unit))

    def _always(self) -> int:
        """No tile always keeps more units than this."""
        config = self.config
        near = (config.window + self.tile_tokens) // self.unit + 2 if config.window else 0
        return near + (config.sinks // self.unit + 1 if config.sinks else 0)

    def _most_kept(self, config: SparseConfig, length: int) -> int:
        """As `Plan.max_kept`, for sequences of at most `length` keys."""
        budget = min(int(length * config.largest_ratio) + 1, length)
        if config.tokens is not None:
            budget = min(length, config.tokens)
        always = self._always()
        if floors := config.floors():
            always += int(budget * sum(floors.values()) / self.unit) + 1 + len(floors)
        return min(math.ceil(length / self.unit), max(budget // self.unit + 2, always))

    def _chunk_plans(
        self, queries: int, first: int, length: int, table: Tensor, kind: Tensor, asks: Tensor
    ) -> tuple[Plan, Plan]:
        """The plan of a chunk of a prompt, which tokens before it may precede.

        Args:
            kind: (T,) int8, modality of each tile.
            asks: (T,) int8, whose ratio it has.
        """
        num_units = math.ceil(length / self.unit)
        start = self._first[:num_units]
        units = torch.stack([start, (length - start).clamp(max=self.unit)], -1)[None]
        end = torch.arange(first + 1, length + 1, device=self.device, dtype=torch.int32)
        span = torch.stack([torch.zeros_like(end), end], -1)[None]
        tiles = self._runs(queries, 0)[None]
        tile_span = torch.zeros_like(tiles)
        tile_span[..., 1] = tiles.sum(-1) + first
        unit_kind = self._kind.new_full((1, num_units), TEXT)
        if len(self.kinds) > 1:
            unit_kind = self._kinds_of(table[None], num_units).contiguous()
        plan = self._plan(
            self.config, units=units, unit_modality=unit_kind, tiles=tiles,
            tile_modality=kind[None], span=span, tile_span=tile_span, length=length,
            queries=queries, offset=first, unit_offset=0, tile_offset=0,
        )  # fmt: skip
        plan.memo["modalities"] = self.kinds
        plan.memo["query_modality"] = asks[None]
        plan.memo["sinks", self.config.sinks] = self._sinks[:, :num_units]
        for config in self.configs:
            plan.memo["max_kept", config] = self._most_kept(config, length)
        return plan, plan

    def _plan(
        self, config: SparseConfig, *, units: Tensor, unit_modality: Tensor, tiles: Tensor,
        tile_modality: Tensor, span: Tensor, tile_span: Tensor, length: int, queries: int,
        offset: int, unit_offset: int, tile_offset: int,
    ) -> Plan:  # fmt: skip
        layout: Any = PagedTokens(len(units), length)
        return Plan(
            layout=layout, config=config, group=self.group, num_queries=queries,
            query_offset=offset, tile_tokens=self.tile_tokens, tiles=tiles, units=units, span=span,
            tile_span=tile_span, tile_modality=tile_modality, unit_modality=unit_modality,
            unit_offset=unit_offset, tile_offset=tile_offset,
        )  # fmt: skip


def _without_ratios(config: SparseConfig) -> SparseConfig:
    return replace(
        config, ratio=1.0, head_ratio=(), query_ratio={}, layer_ratio={}, dense_layers=()
    )


def _holds_text(modality: Tensor, tiles: Tensor) -> Tensor:
    """(T,) bool: whether any token of a tile, (T, 2) first and count, is text."""
    before = torch.nn.functional.pad((modality == TEXT).cumsum(0), (1, 0))
    first, end = tiles.long().cumsum(-1).unbind(-1)
    return before[end] > before[first]

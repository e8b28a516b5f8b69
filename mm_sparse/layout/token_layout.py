"""Which token of a batch is what: modality, segment, document, padding.

B batch, M tokens of a row
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mm_sparse.config import SparseConfig
from mm_sparse.layout.build_plan import build_plan
from mm_sparse.layout.parsing import (
    PAD,
    Grid,
    Span,
    frame_starts,
    grid_starts,
    parse_row,
    shape_of,
)
from mm_sparse.layout.partition import fill_documents, piece_edges
from mm_sparse.layout.plan import Plan
from mm_sparse.modality import Modality


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Modality, segment and document of every token of a batch of sequences.

    A segment is a run of one modality from one source (an image, a frame of a video, a clip of
    audio, a stretch of text); a document is what may attend to each other.
    Documents of a row follow one another; padding may stand before, between and behind them.
    """

    modality: Tensor
    """(B, M) int8, a `Modality`."""
    segment: Tensor
    """(B, M) int32, changes where a segment ends."""
    document: Tensor
    """(B, M) int32, non-decreasing along a row; -1 is padding."""
    span: Tensor | None = None
    """(B, M, 2) int32 or None: half-open range of keys each token sees, by a model's mask."""
    grids: tuple[dict[int, Grid], ...] = ()
    """Per row, sides in tokens by segment number: (height, width) of an image, (frames, height,
    width) of a video, whose frames are this segment and the next ones, or all in this one."""
    order: Tensor | None = None
    """(B or 1, M) int64 or None: which token of the sequence stands at each place, where that is
    another (`grid_order.ordered_layout`); all else here is by place."""
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)
    """Plans and ordered layouts of this layout (docs/reference/caches.md)."""

    def __post_init__(self) -> None:
        for name in ("modality", "segment", "document"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dim() != 2:
                raise ValueError(f"{name} must be a (batch, tokens) tensor, got {shape_of(value)}")
            if value.is_floating_point() or value.shape != self.modality.shape:
                raise ValueError(
                    f"{name} must be integers of shape {tuple(self.modality.shape)}, "
                    f"got {value.dtype} of shape {tuple(value.shape)}"
                )
            if value.device != self.modality.device:
                raise ValueError(f"{name} must be on {self.modality.device}, got {value.device}")
        want = (*self.modality.shape, 2)
        if self.span is not None and getattr(self.span, "shape", None) != want:
            raise ValueError(f"span must have shape {want}, got {shape_of(self.span)}")

    @cached_property
    def batch(self) -> int:
        """Rows."""
        return self.modality.shape[0]

    @cached_property
    def length(self) -> int:
        """Tokens of a row, padding included."""
        return self.modality.shape[1]

    @cached_property
    def device(self) -> torch.device:
        """Where the layout lives."""
        return self.modality.device

    @cached_property
    def valid(self) -> Tensor:
        """(B, M) bool, False on padding."""
        return self.document >= 0

    @classmethod
    def text(cls, batch: int, length: int, device: torch.device | str | None = None) -> TokenLayout:
        """Rows of one text document without padding."""
        return cls.from_spans([("text", length)], batch=batch, device=device)

    @classmethod
    def from_spans(
        cls, spans: Sequence[Span], batch: int = 1, device: torch.device | str | None = None
    ) -> TokenLayout:
        """The same row, `batch` times.

        Args:
            spans: (kind, size) or (kind, size, document) in order; kind is "text", "image",
                "audio", "video" or "pad"; size is a number of tokens, the (height, width) of an
                image or the (frames, height, width) of a video.
        Raises:
            ValueError: a span is none of these.

        Example:
            >>> TokenLayout.from_spans([("text", 12), ("video", (8, 14, 14)), ("text", 40)])
        """
        row = cls.from_rows([spans], device=device)
        fields = (x.repeat(batch, 1) for x in (row.modality, row.segment, row.document))
        return cls(*fields, grids=row.grids * batch)

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Sequence[Span]],
        padding_side: str = "right",
        device: torch.device | str | None = None,
    ) -> TokenLayout:
        """Rows that differ, each as in `from_spans`, padded to the longest."""
        if padding_side not in ("left", "right"):
            raise ValueError(f'padding_side must be "left" or "right", got {padding_side!r}')
        parsed = [parse_row(row) for row in rows]
        length = max((len(p[0]) for p in parsed), default=0)
        columns: list[list[list[int]]] = [[], [], []]
        for modality, segment, document, _ in parsed:
            missing = length - len(modality)
            # Padding on the left must not change the numbers that grids refer to.
            for column, values, filler in zip(
                columns, (modality, segment, document), (0, -1, PAD), strict=True
            ):
                pad = [filler] * missing
                column.append(pad + values if padding_side == "left" else values + pad)
        shape = (len(rows), length)
        modality, segment, document = (
            torch.tensor(c, dtype=t, device=device).view(shape)
            for c, t in zip(columns, (torch.int8, torch.int32, torch.int32), strict=True)
        )
        return cls(modality, segment, document, grids=tuple(p[3] for p in parsed))

    @classmethod
    def from_input_ids(
        cls,
        input_ids: Tensor,
        *,
        image_token_id: int | Iterable[int] | None = None,
        audio_token_id: int | Iterable[int] | None = None,
        video_token_id: int | Iterable[int] | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        image_grids: Sequence[tuple[int, int]] | Tensor | None = None,
        video_grids: Sequence[tuple[int, int, int]] | Tensor | None = None,
    ) -> TokenLayout:
        """Layout of a processor's output: placeholder ids stand for image, audio and video tokens.

        Args:
            input_ids: (B, M).
            image_token_id, audio_token_id, video_token_id: placeholder ids.
            attention_mask: (B, M), zero on padding.
            document_ids: (B, M), non-decreasing along a row; negative is padding.
            image_grids: (height, width) in tokens of every image of the batch, row by row. Without
                them, images that touch are one segment.
            video_grids: (frames, height, width) in tokens of every video of the batch, row by row;
                frames may lie apart, with text between them. Without them, frames that touch are
                one segment.
        Raises:
            ValueError: shapes do not fit, or grids do not fit the tokens.

        Example:
            >>> TokenLayout.from_input_ids(ids, video_token_id=151656, video_grids=[(8, 14, 14)])
        """
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
            raise ValueError(
                f"input_ids must be a (batch, tokens) tensor, got {shape_of(input_ids)}"
            )
        if input_ids.is_floating_point():
            raise ValueError(f"input_ids must be integers, got {input_ids.dtype}")
        modality = torch.zeros_like(input_ids, dtype=torch.int8)
        for ids, kind in (
            (image_token_id, Modality.IMAGE),
            (audio_token_id, Modality.AUDIO),
            (video_token_id, Modality.VIDEO),
        ):
            for token in [ids] if isinstance(ids, int) else ids or ():
                modality.masked_fill_(input_ids == token, int(kind))
        return cls.from_modality(
            modality,
            attention_mask=attention_mask,
            document_ids=document_ids,
            image_grids=image_grids,
            video_grids=video_grids,
        )

    @classmethod
    def from_modality(
        cls,
        modality: Tensor,
        *,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        image_grids: Sequence[tuple[int, int]] | Tensor | None = None,
        video_grids: Sequence[tuple[int, int, int]] | Tensor | None = None,
        span: Tensor | None = None,
    ) -> TokenLayout:
        """Layout from a (B, M) tensor of modalities; other arguments as in `from_input_ids`."""
        if not isinstance(modality, Tensor) or modality.dim() != 2:
            raise ValueError(f"modality must be a (batch, tokens) tensor, got {shape_of(modality)}")
        if modality.is_floating_point():
            raise ValueError(f"modality must be integers, got {modality.dtype}")
        unknown = (modality < 0) | (modality >= len(Modality))
        if bool(unknown.any()):
            raise ValueError(
                f"modality must hold numbers of {[m.name for m in Modality]}, "
                f"got {modality[unknown][0].item()}"
            )
        document = torch.zeros_like(modality, dtype=torch.int32)
        for name, value in (("attention_mask", attention_mask), ("document_ids", document_ids)):
            if value is not None and getattr(value, "shape", None) != modality.shape:
                raise ValueError(
                    f"{name} must have shape {tuple(modality.shape)}, got {shape_of(value)}"
                )
        if document_ids is not None:
            document = document_ids.to(torch.int32)
            filled = fill_documents(document)
            if bool((filled[:, 1:] < filled[:, :-1]).any()):
                raise ValueError(
                    "document_ids must not decrease along a row: a document is one run of tokens"
                )
        if attention_mask is not None:
            document = document.masked_fill(attention_mask == 0, PAD)
        change = torch.ones_like(modality, dtype=torch.bool)
        change[:, 1:] = (modality[:, 1:] != modality[:, :-1]) | (
            document[:, 1:] != document[:, :-1]
        )
        grids: tuple[dict[int, Grid], ...] = tuple({} for _ in range(len(modality)))
        heads: list[tuple[int, int, Grid]] = []
        for kind, given in ((Modality.IMAGE, image_grids), (Modality.VIDEO, video_grids)):
            if given is not None:
                heads += grid_starts(modality, document, given, kind)
        for row, column, grid in heads:
            change[row, list(frame_starts(column, grid))] = True
        segment = change.cumsum(1).to(torch.int32) - 1
        for row, column, grid in heads:
            grids[row][int(segment[row, column])] = grid
        return cls(modality.to(torch.int8), segment, document, span=span, grids=grids)

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same layout on another device."""
        move = {
            n: None if getattr(self, n) is None else getattr(self, n).to(device)
            for n in ("modality", "segment", "document", "span", "order")
        }
        return replace(self, **move, memo={})

    def visible_span(self, causal: bool, bidirectional: Sequence[Modality] = ()) -> Tensor:
        """Half-open range of keys that each token sees: (B, M, 2) int32.

        Empty on padding, unless an explicit span says that padding looks at something. No range
        ends before it starts, whatever an explicit span says: kernels count on it.
        """
        if self.span is not None:
            low, high = self.span.clamp(0, self.length).to(torch.int32).unbind(-1)
            return torch.stack([low, high.maximum(low)], -1)
        low, high = piece_edges(fill_documents(self.document))
        if causal:
            high = torch.arange(1, self.length + 1, device=self.device).expand_as(high)
            _, segment_end = piece_edges(self.segment)
            for kind in bidirectional:
                high = torch.where(self.modality == int(kind), segment_end.maximum(high), high)
        elif self.length:
            # A document ends with its last token, whatever padding follows.
            position = torch.arange(self.length, device=self.device)
            latest = torch.where(self.valid, position, -1).cummax(1).values
            high = latest.gather(1, (high - 1).long()) + 1
        span = torch.stack([low, high], -1)
        return torch.where(self.valid[..., None], span, 0).to(torch.int32)

    def first_query(self, num_queries: int, query_offset: int | None = None) -> int:
        """Position of the first of N queries: `query_offset`, or so that they are the last."""
        offset = self.length - num_queries if query_offset is None else query_offset
        if num_queries < 0 or offset < 0 or offset + num_queries > self.length:
            raise ValueError(
                f"num_queries and query_offset must lie in a layout of {self.length} tokens, "
                f"got {num_queries} and {offset}"
            )
        return offset

    def plan(
        self,
        config: SparseConfig,
        *,
        num_query_heads: int,
        num_kv_heads: int,
        num_queries: int | None = None,
        query_offset: int | None = None,
    ) -> Plan:
        """Tiles, units, visibility, floors and budgets under `config`.

        Args:
            num_queries: N, all tokens if None.
            query_offset: position of the first query; by default the queries are the last N tokens.
        """
        if not isinstance(config, SparseConfig):
            raise TypeError(f"config must be a SparseConfig, got {type(config).__name__}")
        num_queries = self.length if num_queries is None else num_queries
        offset = self.first_query(num_queries, query_offset)
        if num_kv_heads < 1 or num_query_heads < 1 or num_query_heads % num_kv_heads:
            raise ValueError(
                f"num_query_heads must be a multiple of num_kv_heads, "
                f"got {num_query_heads} and {num_kv_heads}"
            )
        for heads in config.head_counts - {num_kv_heads}:
            name = "head_ratio" if config.head_ratio else "query_ratio"
            raise ValueError(
                f"{name} must have a ratio for each of {num_kv_heads} KV heads, got {heads}"
            )
        group = num_query_heads // num_kv_heads
        if group > config.tile:
            raise ValueError(
                f"tile must hold the {group} query heads of a KV head, got {config.tile}"
            )
        key = (config, group, num_queries, offset)
        # A plan is a function of the frozen layout and of this key alone.
        if key not in self.memo:
            self.memo[key] = self.new_plan(config, group, num_queries, offset, keep=True)
        return self.memo[key]

    def new_plan(
        self, config: SparseConfig, group: int, num_queries: int, offset: int, keep: bool = False
    ) -> Plan:
        """The plan of N queries from `offset` on; its tiles and units are kept only if asked."""
        if not keep:
            return build_plan(self, config, group, num_queries, offset)
        blocks = (config.tile, config.unit, config.causal, config.bidirectional)
        key = (*blocks, group, num_queries, offset)
        if key not in self.memo:
            self.memo[key] = build_plan(self, config, group, num_queries, offset)
        return self.memo[key].sharing(config=config)

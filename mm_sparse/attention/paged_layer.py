"""Sparse attention of one layer over pages: describe what is new, rank, select, attend.

N tokens of a step, H query heads, K KV heads, D head dim, A pages in memory, S tokens of a page,
T tiles, U units, F width of a descriptor
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm_sparse.attention.paged_geometry import PagedGeometry, PagedRows, PagedStep, serves_pages
from mm_sparse.config import SparseConfig
from mm_sparse.kernels.paged.pages import Pages, flat_tokens, page_layout
from mm_sparse.kernels.paged_attention import paged_attention
from mm_sparse.scorers import Descriptors, Scorer, described_units
from mm_sparse.selection import topk_lists


class PagedLayer:
    """One layer of a model that an engine serves.

    Descriptors are kept by page, so that sequences which share a page share what it holds, and a
    page that is given to another sequence is described anew with its tokens.

    Args:
        geometry: of the steps, which layers share.
        config: of the layer, one of the geometry's.
        scorer: of the layer; one for which `serves_pages` knows no reason against.
    Raises:
        ValueError: config or scorer cannot serve.
    """

    def __init__(self, geometry: PagedGeometry, config: SparseConfig, scorer: Scorer) -> None:
        reason = serves_pages(config, scorer, geometry.units_of_page * geometry.unit)
        if reason is not None:
            raise ValueError(f"config and scorer must serve pages: {reason}")
        if config not in geometry.configs:
            raise ValueError("config must be one of the geometry's, got another")
        self.geometry, self.config, self.scorer = geometry, config, scorer
        self.units: Tensor | None = None
        """(1, K, A * units of a page + 1, F): the last one is nobody's."""
        self.parts: Tensor | None = None
        """(1, K, A * units of a page + 1, C, F), of scorers that see parts of units."""

    @torch.no_grad()
    def describe(self, q: Tensor, k: Tensor, step: PagedStep, scale: float) -> Descriptors:
        """Describe the units that a step's tokens fall into, and give descriptors of its tiles.

        Args:
            q: (N, H, D).
            k: (A, K, S, D), that hold the step's keys.
            step: of the geometry.
            scale: factor on q.k.
        """
        stride = page_layout(k, self.geometry.unit)[1]
        plan = self.geometry.describing_plan(step, stride, self.config)
        described = self.scorer.described(q.transpose(0, 1)[None], flat_tokens(k), plan, scale)
        whole = described_units(described, plan)
        described = described._replace(unit=whole)
        places = self.geometry.places(step)
        self.units = self._write(self.units, whole, places)
        if described.parts is not None:
            self.parts = self._write(self.parts, described.parts, places)
        return described

    def _write(self, pool: Tensor | None, new: Tensor, places: Tensor) -> Tensor:
        """Put descriptors of units (1, K, n, ...) where they belong."""
        if pool is None:
            room = self.geometry.spare + 1
            # Written to in every mode of autograd.
            with torch.inference_mode(False):
                pool = new.new_empty(1, new.shape[1], room, *new.shape[3:])
        pool[0].index_copy_(1, places, new[0].to(pool.dtype))
        return pool

    @torch.no_grad()
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, step: PagedStep, scale: float, out: Tensor
    ) -> None:
        """Attention of the step's sequences that run sparse, written to `out`.

        Args:
            q: (N, H, D).
            k, v: (A, K, S, D), that hold the step's keys and values.
            step: of the geometry.
            scale: factor on q.k.
            out: (N, H, D); rows of sequences that are dense are left as they are.
        """
        described = self.describe(q, k, step, scale)
        for rows in step.rows:
            self._attend_rows(q, k, v, rows, described, scale, out)

    def _attend_rows(
        self, q: Tensor, k: Tensor, v: Tensor, rows: PagedRows, described: Descriptors,
        scale: float, out: Tensor,
    ) -> None:  # fmt: skip
        plan = rows.plan.sharing(config=self.config)
        batch = len(rows.table)
        tile, exists = described.tile[:, :, rows.tiles], described.exists[:, rows.tiles]
        own, into = q[rows.queries], out[rows.queries]
        if batch > 1:
            # One tile of each sequence.
            tile, exists = tile.transpose(0, 2), exists.transpose(0, 1)
        if self.units is None:
            raise RuntimeError("units must be described before sequences attend")
        described = described._replace(tile=tile, exists=exists, unit=self.units, parts=self.parts)
        per_page = self.geometry.units_of_page
        scores = self.scorer.score_described(
            described,
            rows.placed.sharing(config=self.config),
            Pages(rows.table, per_page, per_page),
        )
        index, count = topk_lists(scores, plan)
        own = own.unflatten(0, (batch, -1)).transpose(1, 2)  # (B, H, n, D)
        lists = plan.block_lists(index, count)
        found, _ = paged_attention(own, k, v, rows.table, lists, scale, self.config.backend)
        into.unflatten(0, (batch, -1)).copy_(found.transpose(1, 2))

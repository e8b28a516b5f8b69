"""Make a plan: cut queries into tiles and keys into units.

B batch, N query tokens, M key tokens, T tiles, U units
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mm_sparse.config import SparseConfig
from mm_sparse.layout.partition import drop_padding, majority, partition, per_piece, regular_offset
from mm_sparse.layout.plan import Plan

if TYPE_CHECKING:
    from mm_sparse.layout.token_layout import TokenLayout


def build_plan(
    layout: TokenLayout, config: SparseConfig, group: int, num_queries: int, offset: int
) -> Plan:
    """Cut queries into tiles and keys into units.

    Pieces end where segments end, unless both segments are shorter than a piece: runs of such
    segments are cut as if they were one, so a row has at most 3 M / size + 1 pieces plus two for
    each hole of padding, however many segments it has. Visibility is decided per key there.
    """
    queries = slice(offset, offset + num_queries)
    tile_tokens = max(config.tile // group, 1)
    span = layout.visible_span(config.causal, config.bidirectional)[:, queries].contiguous()
    tiles, tile_of = partition(layout.segment[:, queries], layout.valid[:, queries], tile_tokens)
    units, unit_of = partition(layout.segment, layout.valid, config.unit)
    units, unit_of = drop_padding(units, unit_of, layout.valid)
    low = torch.where(span[..., 0] < span[..., 1], span[..., 0], layout.length)
    num_tiles, num_units = tiles.shape[1], units.shape[1]
    tile_span = torch.stack(
        [
            per_piece(low, tile_of, num_tiles, "amin", layout.length),
            per_piece(span[..., 1], tile_of, num_tiles, "amax", 0),
        ],
        -1,
    )
    modality = torch.where(layout.valid, layout.modality, -1)
    return Plan(
        layout=layout,
        config=config,
        group=group,
        num_queries=num_queries,
        query_offset=offset,
        tile_tokens=tile_tokens,
        tiles=tiles,
        units=units,
        span=span,
        tile_span=tile_span,
        tile_modality=majority(modality[:, queries], tile_of, num_tiles),
        unit_modality=majority(modality, unit_of, num_units),
        unit_offset=regular_offset(units, config.unit, layout.length),
        tile_offset=regular_offset(tiles, tile_tokens, num_queries),
    )

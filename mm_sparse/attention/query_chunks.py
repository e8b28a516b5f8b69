"""Queries in chunks, where the scores of all would not fit in memory.

Scores are (tiles x units): at a million tokens they would take more memory than all else. Tiles
have nothing to do with one another, so a chunk of them is scored, attended and forgotten.
"""

from __future__ import annotations

import torch

from mm_sparse.config import SparseConfig
from mm_sparse.layout import Plan, TokenLayout

# Scores, one for a row, KV head, tile and unit, that are in memory at once: 256 MiB of them.
MOST_SCORES = 1 << 26


def query_chunks(
    layout: TokenLayout,
    config: SparseConfig,
    *,
    num_query_heads: int,
    num_kv_heads: int,
    num_queries: int,
    query_offset: int,
) -> list[slice]:
    """Runs of whole tiles whose scores are `MOST_SCORES` at most, about equally long."""
    tokens = max(config.tile * num_kv_heads // num_query_heads, 1)
    tiles, ranked = -(-num_queries // tokens), _ranked(layout.length, config)
    most = max(MOST_SCORES // max(layout.batch * num_kv_heads * ranked, 1), 1)
    if tiles <= most:
        return [slice(0, num_queries)]
    if layout.batch == 1:
        plan = layout.plan(
            config,
            num_query_heads=num_query_heads,
            num_kv_heads=num_kv_heads,
            num_queries=num_queries,
            query_offset=query_offset,
        )
        tiles = plan.tiles.shape[1]
        starts = plan.tiles[0, :: _tiles_of_chunk(tiles, most), 0].tolist()
    else:
        starts = [*range(0, num_queries, _tiles_of_chunk(tiles, most) * tokens)]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], num_queries], strict=True)]


def plan_of_chunk(plan: Plan, chunk: slice) -> Plan:
    """The plan of a chunk of the queries of a plan; it is used once and kept nowhere."""
    if plan.layout.batch == 1:
        first = plan.tiles[0, :, 0]
        tiles = (first >= chunk.start) & (first < chunk.stop) & (plan.tiles[0, :, 1] > 0)
        number = tiles.nonzero()[:, 0]
        return plan.select_tiles(slice(int(number[0]), int(number[-1]) + 1), chunk)
    if plan.regular_tiles:
        step = plan.tile_tokens
        return plan.select_tiles(slice(chunk.start // step, -(-chunk.stop // step)), chunk)
    # Segments cut rows at different places, so that no run of queries is whole tiles of all rows.
    return plan.layout.new_plan(
        plan.config, plan.group, chunk.stop - chunk.start, plan.query_offset + chunk.start
    )


def queries_of_share(plan: Plan, share: int, shares: int) -> slice:
    """A run of whole tiles that see about as many keys as those of the other shares.

    Raises:
        ValueError: tiles of the rows of a batch are not the same queries.
    """
    if plan.layout.batch > 1 and not plan.regular_tiles:
        raise ValueError(
            "a batch must have one row, or rows without padding and of one segment, where ranks "
            f"share a KV head; got {plan.layout.batch} rows"
        )
    borders = plan.memoize(("shares", shares), lambda: _borders(plan, shares))
    return slice(borders[share], borders[share + 1])


def _borders(plan: Plan, shares: int) -> list[int]:
    """Queries at which shares begin, and their number."""
    real = plan.tiles[0, :, 1] > 0
    first = plan.tiles[0, real, 0].tolist()
    if not first:
        return [0, *[plan.num_queries] * shares]
    seen = (plan.tile_span[0, real, 1] - plan.tile_span[0, real, 0]).double().cumsum(0)
    wanted = seen[-1] * torch.arange(1, shares, device=seen.device) / shares
    # The tile in which a share's work is done is its last.
    inner = (torch.searchsorted(seen, wanted) + 1).tolist()
    inner = [first[at] if at < len(first) else plan.num_queries for at in inner]
    return [0, *inner, plan.num_queries]


def _tiles_of_chunk(tiles: int, most: int) -> int:
    return -(-tiles // -(-tiles // most))


def _ranked(length: int, config: SparseConfig) -> int:
    """What is ranked for a tile: all units, or runs of them and then the units of the best."""
    units = -(-length // config.unit)
    if config.coarse_factor == 1:
        return units
    most = config.for_candidates()
    keys = most.largest_ratio * length if most.tokens is None else most.tokens
    return -(-units // config.coarse_factor) + min(-(-int(keys) // config.unit), units)

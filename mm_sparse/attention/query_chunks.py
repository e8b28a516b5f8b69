"""A block of queries after the other, where the scores of all would not fit.

Scores are (tiles x units): at a million tokens they would take more memory than all else. Tiles
have nothing to do with one another, so those of a block are ranked, attended and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator

from mm_sparse.config import SparseConfig
from mm_sparse.layout import TokenLayout

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
) -> Iterator[slice]:
    """Runs of whole tiles whose scores are `MOST_SCORES` at most, about equally long.

    While one is used its plan is at hand in the layout, if there are several; then it is gone.
    """
    tokens = max(config.tile * num_kv_heads // num_query_heads, 1)
    tiles, ranked = -(-num_queries // tokens), _ranked(layout.length, config)
    most = max(MOST_SCORES // max(layout.batch * num_kv_heads * ranked, 1), 1)
    if tiles <= most:
        yield slice(0, num_queries)
        return
    whole = layout.plan(
        config,
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        num_queries=num_queries,
        query_offset=query_offset,
    )
    tiles = whole.tiles.shape[1]
    step = -(-tiles // -(-tiles // most))
    alone = layout.batch == 1
    # Where segments cut rows at other places, no queries are whole tiles of all rows: plans are
    # made anew, for runs of queries.
    sliced = alone or whole.regular_tiles
    starts = (
        whole.tiles[0, ::step, 0].tolist() if alone else [*range(0, num_queries, step * tokens)]
    )
    known = set(layout.made)
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], num_queries], strict=True)):
        block = slice(start, end)
        if sliced:
            part = whole.select_tiles(slice(number * step, (number + 1) * step), block)
            layout.made[(config, part.group, part.num_queries, part.query_offset)] = part
        try:
            yield block
        finally:
            for key in set(layout.made) - known:
                del layout.made[key]


def _ranked(length: int, config: SparseConfig) -> int:
    """What is ranked for a tile: all units, or runs of them and then the units of the best."""
    units = -(-length // config.unit)
    if config.coarse_factor == 1:
        return units
    most = config.for_candidates()
    keys = most.ratio * length if most.tokens is None else most.tokens
    return -(-units // config.coarse_factor) + min(-(-int(keys) // config.unit), units)

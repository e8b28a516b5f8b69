"""A block of queries after the other, where the scores of all would not fit.

Scores are (tiles x units): at a million tokens they would take more memory than all else. Tiles
have nothing to do with one another, so those of a block are ranked, attended and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mm_sparse.config import SparseConfig
from mm_sparse.layout import TokenLayout

# Scores, one for a row, KV head, tile and unit, that are in memory at once: 512 MiB of them.
MOST_SCORES = 1 << 27


def query_blocks(
    num_queries: int, layout: TokenLayout, config: SparseConfig, group: int, kv_heads: int
) -> list[slice]:
    """Runs of whole tiles whose scores are `MOST_SCORES` at most, about equally long.

    Args:
        group: query heads of a KV head.
    """
    tokens = max(config.tile // group, 1)
    tiles, units = -(-num_queries // tokens), -(-layout.length // config.unit)
    most = max(MOST_SCORES // max(layout.batch * kv_heads * units, 1), 1)
    count = max(-(-tiles // most), 1)
    step = -(-tiles // count) * tokens or 1
    return [slice(at, min(at + step, num_queries)) for at in range(0, max(num_queries, 1), step)]


@contextmanager
def forgetting(layout: TokenLayout) -> Iterator[None]:
    """Drop what a layout learns inside: plans of blocks, which together are as large as one."""
    known = set(layout.made)
    try:
        yield
    finally:
        for key in set(layout.made) - known:
            del layout.made[key]

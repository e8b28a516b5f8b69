"""Relevance of every unit of keys for every tile of queries.

B batch, H query heads, K KV heads, G = H / K, N query tokens, M key tokens, D head dim,
T tiles, U units, S query pools of a tile, R rank of the learned score space
"""

from __future__ import annotations

from torch import Tensor

from mm_sparse.layout import Plan
from mm_sparse.scorers.base import Scorer
from mm_sparse.scorers.block_scores import Descriptors
from mm_sparse.scorers.descriptor_cache import DescriptorCache, cached_descriptors
from mm_sparse.scorers.descriptors import means, tile_descriptors, unit_descriptors


class PooledScorer(Scorer):
    """Training-free: every query pool of a tile spreads a softmax over the mean keys of the units.

    The score is the log of the mean (or maximum, `SparseConfig.reduce`) over query pools and query
    heads of the group; a unit counts with its number of keys. Mean-pooled block scores follow
    MInference (Jiang et al., 2024).
    """

    def describe(
        self, q: Tensor, k: Tensor, plan: Plan, scale: float, cache: DescriptorCache | None = None
    ) -> Descriptors:
        if cache is None and (found := means(q, k, plan, scale)) is not None:
            tile, unit, exists = found
            return Descriptors(tile, unit, exists)
        tile, exists = tile_descriptors(q, plan, scale)
        unit = cached_descriptors(
            k, plan, lambda part: unit_descriptors(k, part, extremes=False)[0], cache
        )
        return Descriptors(tile, unit, exists)

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
    """Training-free: each query pool of a tile spreads a softmax over the mean keys of the units.

        s(t, u) = log mean_hs [ n_u exp(scale q_hs . k_u) / sum_u' n_u' exp(scale q_hs . k_u') ]

    with mean queries q_hs of the pools s and the query heads h of a group, mean keys k_u and n_u
    keys in unit u; `SparseConfig.reduce` "max" takes the largest instead of the mean. Mean-pooled
    block scores follow "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic
    Sparse Attention" (https://arxiv.org/abs/2407.02490); pools and the size of units are added.
    """

    def describe(
        self, q: Tensor, k: Tensor, plan: Plan, scale: float, cache: DescriptorCache | None = None
    ) -> Descriptors:
        if cache is None and (pooled := means(q, k, plan, scale)) is not None:
            tile, unit, exists = pooled
            return Descriptors(tile, unit, exists)
        tile, exists = tile_descriptors(q, plan, scale)
        unit = cached_descriptors(
            k, plan, lambda part: unit_descriptors(k, part, extremes=False)[0], cache
        )
        return Descriptors(tile, unit, exists)

"""The base of all scorers.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim, T tiles, U units
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mm_sparse._checks import check_heads
from mm_sparse.config import SparseConfig
from mm_sparse.layout import Plan, TokenLayout
from mm_sparse.scorers.block_scores import Descriptors, block_scores
from mm_sparse.scorers.descriptor_cache import DescriptorCache
from mm_sparse.scorers.two_stage import two_stage_scores
from mm_sparse.selection import Scores


class Scorer(nn.Module):
    """Base of all scorers: a subclass writes `score`, most in a few lines."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        *,
        layout: TokenLayout,
        config: SparseConfig,
        query_offset: int | None = None,
        scale: float | None = None,
        descriptors: DescriptorCache | None = None,
    ) -> Scores:
        """Score the units of `k` for the tiles of `q`.

        Args:
            q: (B, H, N, D), the last N tokens of the layout unless `query_offset` says otherwise.
            k: (B, K, M, D), one key per token of the layout.
            scale: factor on q.k, 1 / sqrt(D) if None.
            descriptors: of the keys that earlier calls for this layer and sequence had.
        """
        check_heads(q, k, k, layout)
        plan = layout.plan(
            config,
            num_query_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            num_queries=q.shape[2],
            query_offset=query_offset,
        )
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        if descriptors is not None:
            plan = plan.sharing(descriptors=descriptors)
        own = type(self).score is not Scorer.score
        if config.coarse_factor > 1 and not own and not torch.is_grad_enabled():
            described = self.describe(q, k, plan, scale)
            if described is not None:
                found = two_stage_scores(described, plan)
                return Scores(found.values, plan, found.runs)
        return Scores(self.score(q, k, plan, scale), plan)

    def score(self, q: Tensor, k: Tensor, plan: Plan, scale: float) -> Tensor:
        """(B, K, T, U), higher is kept first; what `plan.visible` denies may hold anything."""
        described = self.describe(q, k, plan, scale)
        if described is None:
            raise NotImplementedError
        return block_scores(described, plan)

    def describe(self, q: Tensor, k: Tensor, plan: Plan, scale: float) -> Descriptors | None:
        """What a score is made of, for those who do not write `score`.

        From it `SparseConfig.coarse_factor` ranks runs of units first; without it all units are
        ranked.
        """
        return None

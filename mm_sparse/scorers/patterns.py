"""Static baselines with the interface of the learned scorers: same budgets, same kernel.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim, T tiles, U units
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm_sparse.config import SparseConfig
from mm_sparse.layout import Plan, TokenLayout
from mm_sparse.scorers.base import Scorer
from mm_sparse.selection import Scores, Selection, select


class Pattern(Scorer):
    """A scorer that looks at positions only."""

    def select(
        self,
        layout: TokenLayout,
        config: SparseConfig,
        *,
        num_query_heads: int,
        num_kv_heads: int,
        num_queries: int | None = None,
        query_offset: int | None = None,
    ) -> Selection:
        """Selection of this pattern within the budget of `config`."""
        plan = layout.plan(
            config,
            num_query_heads=num_query_heads,
            num_kv_heads=num_kv_heads,
            num_queries=num_queries,
            query_offset=query_offset,
        )
        values = self.rank(plan)[:, None].expand(-1, num_kv_heads, -1, -1)
        return select(Scores(values, plan), layout, config)

    def score(self, q: Tensor, k: Tensor, plan: Plan, scale: float) -> Tensor:
        return self.rank(plan)[:, None].expand(-1, k.shape[1], -1, -1)

    def rank(self, plan: Plan) -> Tensor:
        """(B, T, U), higher is kept first."""
        raise NotImplementedError


class SlidingWindow(Pattern):
    """The nearest units, after the sinks of the config: s(t, u) = -|distance(t, u)|.

    "Efficient Streaming Language Models with Attention Sinks" (https://arxiv.org/abs/2309.17453).
    """

    def rank(self, plan: Plan) -> Tensor:
        return -plan.distance.abs().float()


class BigBird(Pattern):
    """Window, global and random units.

    "Big Bird: Transformers for Longer Sequences" (https://arxiv.org/abs/2007.14062).

    Args:
        window: share of the budget for the nearest units; random ones fill the rest. The global
            units are the sinks of the config.
        seed: of the random units, which are the same for all heads and in every call.
    """

    def __init__(self, window: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= window <= 1:
            raise ValueError(f"window must be a share in [0, 1], got {window!r}")
        self.window, self.seed = window, seed

    def rank(self, plan: Plan) -> Tensor:
        near = (plan.budget * self.window / 2)[..., None]
        # Half of the share lies on either side; a causal tile has one side only.
        ahead = plan.tile_span[..., 1] > plan.tiles[..., 0] + plan.query_offset + plan.tiles[..., 1]
        near = torch.where(ahead[..., None], near, 2 * near) + plan.tile_tokens / 2
        draw = torch.rand(
            plan.distance.shape[1:], generator=torch.Generator().manual_seed(self.seed)
        ).to(plan.distance.device)
        distance = plan.distance.abs()
        return torch.where(distance <= near, 2 - distance / (plan.layout.length + 1), draw)

"""The base of all scorers.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim, T tiles, U units
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mm_sparse._checks import check_heads
from mm_sparse.config import SparseConfig
from mm_sparse.kernels.paged.pages import Pages
from mm_sparse.layout import Plan, TokenLayout
from mm_sparse.scorers.block_scores import Descriptors, block_scores
from mm_sparse.scorers.descriptor_cache import DescriptorCache
from mm_sparse.scorers.two_stage import two_stage_scores
from mm_sparse.selection import Scores


class Scorer(nn.Module):
    """Base of all scorers: a subclass writes `score`, most in a few lines."""

    head_dims: ClassVar[Mapping[str, int]] = {}
    """Parameters and buffers with numbers for each head: along which dimension heads are."""
    _looked_at = False

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
        return self.score_plan(q, k, plan, scale, descriptors)

    def score_plan(
        self,
        q: Tensor,
        k: Tensor,
        plan: Plan,
        scale: float | None = None,
        cache: DescriptorCache | None = None,
    ) -> Scores:
        """`forward` on a plan, for inputs that were checked.

        Args:
            q, k: (B, H, N, D) and (B, K, M, D), of the plan's queries and keys.
            plan: tiles and units to score.
            scale: factor on q.k, 1 / sqrt(D) if None.
            cache: descriptors of the keys that earlier calls had.
        """
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        if type(self).score is not Scorer.score:
            return Scores(self._checked(self.score(q, k, plan, scale), q, k, plan), plan)
        features = self._descriptors(q, k, plan, scale, cache)
        if plan.config.coarse_factor > 1 and not torch.is_grad_enabled():
            two_stage = two_stage_scores(features, plan)
            return Scores(two_stage.values, plan, two_stage.runs)
        return Scores(block_scores(features, plan), plan)

    @property
    def describes(self) -> bool:
        """Whether scores are products of what `describe` gives: any tiles have theirs alone."""
        own = type(self)
        plain = own.forward is Scorer.forward and own.score_plan is Scorer.score_plan
        hooked = self._forward_hooks or self._forward_pre_hooks
        return plain and own.score is Scorer.score and not hooked

    def described(self, q: Tensor, k: Tensor, plan: Plan, scale: float) -> Descriptors:
        """What `describe` gives without a cache, of a scorer that writes it."""
        return self._descriptors(q, k, plan, scale, None)

    def score_described(
        self, described: Descriptors, plan: Plan, pages: Pages | None = None
    ) -> Tensor:
        """(B, K, T, U), of descriptors of the plan's tiles and units, or of units in pages."""
        return block_scores(described, plan, pages=pages)

    def score_step(
        self, q: Tensor, k: Tensor, plan: Plan, placed: Plan, scale: float, cache: DescriptorCache
    ) -> Tensor:
        """(B, K, 1, U) of a step of decoding, of scorers that write `describe`.

        Args:
            plan: whose tile is the query as it stands in q.
            placed: the same with the tile where the query stands among the keys.
        """
        return block_scores(self._descriptors(q, k, plan, scale, cache), placed)

    def score(self, q: Tensor, k: Tensor, plan: Plan, scale: float) -> Tensor:
        """Scores of units, for scorers that do not write `describe`.

        Args:
            q: (B, H, N, D), the queries of the plan's tiles.
            k: (B, K, M, D), one key per token of `plan.layout`.
            plan: `plan.tiles` (B, T, 2) and `plan.units` (B, U, 2) hold first token and length.
            scale: factor on q.k.
        Returns:
            (B, K, T, U), higher is kept first; what `plan.visible` denies may hold anything.
        """
        return block_scores(self._descriptors(q, k, plan, scale, None), plan)

    def describe(
        self,
        q: Tensor,
        k: Tensor,
        plan: Plan,
        scale: float,
        cache: DescriptorCache | None = None,
    ) -> Descriptors | None:
        """Descriptors of tiles and units, whose products are scores (`block_scores`).

        A scorer that writes this gets two-stage selection (`SparseConfig.coarse_factor`) and, with
        `cached_descriptors(k, plan, describe_units, cache)`, decoding that describes new keys only.
        """
        return None

    def _descriptors(
        self, q: Tensor, k: Tensor, plan: Plan, scale: float, cache: DescriptorCache | None
    ) -> Descriptors:
        """What `describe` gives, or an error that says what a subclass must write."""
        features = self.describe(q, k, plan, scale, cache)
        if features is None:
            raise NotImplementedError(
                f"{type(self).__name__} must write score(q, k, plan, scale) or "
                "describe(q, k, plan, scale, cache)"
            )
        return features

    def _checked(self, values: Tensor, q: Tensor, k: Tensor, plan: Plan) -> Tensor:
        """Scores of a subclass, if they are of the shape that selection needs."""
        want = (q.shape[0], k.shape[1], plan.tiles.shape[1], plan.units.shape[1])
        if not isinstance(values, Tensor) or tuple(values.shape) != want:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"{type(self).__name__}.score must give (B, K, T, U) {want}, got {got}"
            )
        # Looking at numbers waits for a GPU: there, the first call of a scorer alone is looked at.
        if values.device.type == "cpu" or not self._looked_at:
            self._looked_at = True
            if bool((values.isnan() & plan.visible[:, None]).any()):
                raise ValueError(f"{type(self).__name__}.score must give numbers, got NaN")
        return values

    def init_args(self) -> dict[str, Any]:
        """Keyword arguments of `__init__` that JSON can hold, for files of scorers.

        A scorer with `register_scorer` is made anew of them when it is loaded.
        """
        return {}

    @classmethod
    def from_init_args(cls, **args: Any) -> Scorer:
        """A scorer of what `init_args` gave."""
        return cls(**args)

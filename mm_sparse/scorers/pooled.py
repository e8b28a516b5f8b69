"""Relevance of every unit of keys for every tile of queries.

B batch, H query heads, K KV heads, G = H / K, N query tokens, M key tokens, D head dim,
T tiles, U units, S sub-pools of a tile, R rank of the learned score space
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm_sparse._checks import check_heads, check_shape, check_sizes
from mm_sparse.config import SparseConfig
from mm_sparse.layout.plan import Plan
from mm_sparse.layout.token_layout import TokenLayout
from mm_sparse.modality import Modality
from mm_sparse.scorers.block_scores import DISTANCE_BUCKETS, Descriptors, share_of_units
from mm_sparse.scorers.descriptor_cache import DescriptorCache, described
from mm_sparse.scorers.descriptors import means, piece_features, tile_descriptors, unit_descriptors
from mm_sparse.scorers.modality_maps import Kept, describe
from mm_sparse.scorers.two_stage import Runs, rank_in_two_steps


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores and the geometry that they are scores of."""

    values: Tensor
    """(B, K, T, U): log of the predicted share of attention, up to a learned bias; of the units of
    `runs` alone, (B, K, T, C), if there are any."""
    plan: Plan
    runs: Runs | None = None
    """Runs of units whose units were ranked; None where all were (`SparseConfig.coarse`)."""

    @property
    def shape(self) -> torch.Size:
        """Shape of `values`."""
        return self.values.shape


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
        if config.coarse > 1 and not own and not torch.is_grad_enabled():
            described = self.describe(q, k, plan, scale)
            if described is not None:
                found = rank_in_two_steps(described, plan)
                return Scores(found.values, plan, found.runs)
        return Scores(self.score(q, k, plan, scale), plan)

    def score(self, q: Tensor, k: Tensor, plan: Plan, scale: float) -> Tensor:
        """(B, K, T, U), higher is kept first; what `plan.visible` denies may hold anything."""
        described = self.describe(q, k, plan, scale)
        if described is None:
            raise NotImplementedError
        return share_of_units(described, plan)

    def describe(self, q: Tensor, k: Tensor, plan: Plan, scale: float) -> Descriptors | None:
        """What a score is made of, for those who do not write `score`.

        From it `SparseConfig.coarse` ranks runs of units first; without it all units are ranked.
        """
        return None


class PooledScorer(Scorer):
    """Training-free: every sub-pool of a tile spreads a softmax over the mean keys of the units.

    The score is the log of the mean (or maximum, `SparseConfig.reduce`) over sub-pools and query
    heads of the group; a unit counts with its number of keys. Mean-pooled block scores follow
    MInference (Jiang et al., 2024).
    """

    def describe(self, q: Tensor, k: Tensor, plan: Plan, scale: float) -> Descriptors:
        if (found := means(q, k, plan, scale)) is not None:
            tile, unit, exists = found
            return Descriptors(tile, unit, exists)
        tile, exists = tile_descriptors(q, plan, scale)
        unit = described(k, plan, lambda part: unit_descriptors(k, part, extremes=False)[0])
        return Descriptors(tile, unit, exists)


class RelevanceScorer(Scorer):
    """The pooled score plus a learned one: a tower per modality into one score space, and biases.

    The tile tower maps each sub-pool mean (per query head), the unit tower mean, maximum and
    minimum of the keys (per KV head), each with the weights of its modality; their product of
    rank R is added to the pooled one. The unit towers and the biases, per pair of modalities and
    distance, start at zero: untrained, it equals `PooledScorer`.

    Args:
        num_query_heads, num_kv_heads, head_dim: H, K, D of the layer.
        rank: R.
    """

    def __init__(
        self, *, num_query_heads: int, num_kv_heads: int, head_dim: int, rank: int = 64
    ) -> None:
        super().__init__()
        check_sizes(num_query_heads, num_kv_heads, head_dim=head_dim, rank=rank)
        kinds = len(Modality)
        self.num_query_heads, self.num_kv_heads = num_query_heads, num_kv_heads
        self.head_dim, self.rank = head_dim, rank
        self.query_tower = nn.Parameter(torch.empty(kinds, num_query_heads, head_dim, rank))
        self.key_tower = nn.Parameter(torch.zeros(kinds, num_kv_heads, 3 * head_dim, rank))
        self.pair_bias = nn.Parameter(torch.zeros(num_kv_heads, kinds, kinds, DISTANCE_BUCKETS))
        nn.init.normal_(self.query_tower, std=1 / math.sqrt(head_dim))
        self.register_buffer("map_of", torch.arange(kinds), persistent=False)
        self._kept = Kept()

    map_of: Tensor
    """(modalities,): each has a tower of its own."""

    def describe(self, q: Tensor, k: Tensor, plan: Plan, scale: float) -> Descriptors:
        check_shape(q, k, self.num_query_heads, self.num_kv_heads, self.head_dim)
        if not torch.is_grad_enabled():
            return self._describe(q, k, plan, scale)
        tile, exists = tile_descriptors(q, plan)
        described = unit_descriptors(k, plan, extremes=True)
        mean, features = described[0], torch.cat(described, -1)  # (B, K, U, 3 D)
        tile_code = _by_modality(
            tile.flatten(2, 3),
            self.query_tower,
            plan.tile_modality.repeat_interleave(tile.shape[3], 1),
        ).view(*tile.shape[:4], -1)
        unit_code = _by_modality(features, self.key_tower, plan.unit_modality)
        return Descriptors(
            torch.cat([tile * scale, tile_code], -1),
            torch.cat([mean, unit_code], -1),
            exists,
            self.pair_bias,
        )

    def _describe(self, q: Tensor, k: Tensor, plan: Plan, scale: float) -> Descriptors:
        """The same without gradients, one product for a piece, in the precision of the keys."""
        towers = (self.query_tower, self.key_tower)

        def make() -> tuple[Tensor, ...]:
            return tuple(
                _beside_mean(t, self.head_dim, s).to(q.dtype)
                for t, s in zip(towers, (scale, 1.0), strict=True)
            )

        query_map, key_map = self._kept.get(towers, (scale, q.dtype), make)
        tile, exists = tile_descriptors(q, plan)
        kinds = [int(m) for m in Modality]

        def describe_units(part: Plan) -> Tensor:
            features = piece_features(k, part.units, part.unit, 1, part.regular, part).squeeze(3)
            return describe(features, key_map, self.map_of, kinds, part.unit_modality, part)

        own = plan.tile_modality.repeat_interleave(tile.shape[3], 1)
        tile = describe(tile.flatten(2, 3), query_map, self.map_of, kinds, own, plan)
        unit = described(k, plan, describe_units)
        tile = tile.unflatten(2, exists.shape[1:])
        return Descriptors(tile, unit, exists, self.pair_bias)


def _beside_mean(towers: Tensor, dim: int, scale: float) -> Tensor:
    """(M + 1, heads, F, D + R): the mean times `scale` beside a tower's code; the last has none."""
    heads, width = towers.shape[1:3]
    mean = torch.eye(width, dim, device=towers.device, dtype=towers.dtype) * scale
    mean = mean.expand(len(towers) + 1, heads, -1, -1)
    return torch.cat([mean, torch.cat([towers, torch.zeros_like(towers[:1])])], -1)


def _by_modality(x: Tensor, towers: Tensor, modality: Tensor) -> Tensor:
    """Map (B, heads, P, F) by the tower (modalities, heads, F, R) of each piece's modality."""
    kinds, heads, _, rank = towers.shape
    mapped = x.to(towers.dtype) @ towers.permute(1, 2, 0, 3).flatten(2)  # all towers in one product
    own = modality.long().clamp(min=0)[:, None, :, None, None].expand(-1, heads, -1, 1, rank)
    result = mapped.unflatten(-1, (kinds, rank)).gather(3, own).squeeze(3)
    return result.masked_fill((modality < 0)[:, None, :, None], 0)

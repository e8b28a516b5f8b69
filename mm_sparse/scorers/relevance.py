"""The relevance scorer: the pooled score plus a learned low-rank one.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim, T tiles, U units,
R rank of the learned score space
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mm_sparse._checks import check_shape, check_sizes
from mm_sparse.layout import Plan
from mm_sparse.modality import Modality
from mm_sparse.scorers.base import Scorer
from mm_sparse.scorers.block_scores import DISTANCE_BUCKETS, Descriptors
from mm_sparse.scorers.descriptor_cache import DescriptorCache, cached_descriptors
from mm_sparse.scorers.descriptors import piece_features, tile_descriptors, unit_descriptors
from mm_sparse.scorers.modality_maps import WeightCache, add_video, describe
from mm_sparse.scorers.registry import register_scorer


@register_scorer("relevance")
class RelevanceScorer(Scorer):
    """The pooled score plus a learned one: a tower per modality into one score space, and biases.

    The tile tower maps each query pool mean (per query head), the unit tower mean, maximum and
    minimum of the keys (per KV head), each with the weights of its modality; their product of
    rank R is added to the pooled one. The unit towers and the biases, per pair of modalities and
    distance, start at zero: untrained, it equals `PooledScorer`.

        logit(t, s, u) = scale q_s . k_u + (A^m(t) q_s) . (B^m(u) [mean; max; min of u]) + log n_u
        s(t, u) = log mean_s softmax_u logit(t, s, u) + bias[m(t), m(u), distance(t, u)]

    with the modality m of a tile or unit. A method of this project.

    Args:
        num_query_heads, num_kv_heads, head_dim: H, K, D of the layer.
        rank: R.
    """

    head_dims = MappingProxyType({"query_tower": 1, "key_tower": 1, "pair_bias": 0})

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
        self._kept = WeightCache()

    def init_args(self) -> dict[str, Any]:
        return {
            "num_query_heads": self.num_query_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rank": self.rank,
        }

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Also tensors that were stored before there was VIDEO."""
        for name in ("query_tower", "key_tower"):
            add_video(state_dict, prefix + name, (0,), getattr(self, name))
        add_video(state_dict, f"{prefix}pair_bias", (1, 2), self.pair_bias)
        super()._load_from_state_dict(state_dict, prefix, *args)

    map_of: Tensor
    """(modalities,): each has a tower of its own."""

    def describe(
        self, q: Tensor, k: Tensor, plan: Plan, scale: float, cache: DescriptorCache | None = None
    ) -> Descriptors:
        check_shape(q, k, self.num_query_heads, self.num_kv_heads, self.head_dim)
        if not torch.is_grad_enabled():
            return self._describe(q, k, plan, scale, cache)
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

    def _describe(
        self, q: Tensor, k: Tensor, plan: Plan, scale: float, cache: DescriptorCache | None
    ) -> Descriptors:
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
            return describe(
                features, key_map, self.map_of, kinds, part.unit_modality, part.modalities
            )

        own = plan.tile_modality.repeat_interleave(tile.shape[3], 1)
        tile = describe(
            tile.flatten(2, 3), query_map, self.map_of, kinds, own, plan.tile_modalities
        )
        unit = cached_descriptors(k, plan, describe_units, cache)
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

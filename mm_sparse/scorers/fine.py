"""A scorer that sees parts of units, and what queries and keys of a part have in common.

B batch, H query heads, K KV heads, D head dim, T tiles, U units, S query pools of a tile, C parts
of a unit
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mm_sparse._checks import check_shape, check_sizes
from mm_sparse.layout import Plan
from mm_sparse.modality import Modality
from mm_sparse.scorers.base import Scorer
from mm_sparse.scorers.block_scores import DISTANCE_BUCKETS, Descriptors, block_scores
from mm_sparse.scorers.descriptor_cache import DescriptorCache, cached_descriptors
from mm_sparse.scorers.descriptors import piece_features
from mm_sparse.scorers.modality_maps import WeightCache, add_video, describe
from mm_sparse.scorers.registry import register_scorer


@register_scorer("fine")
class FineScorer(Scorer):
    """Query pools of a tile against parts of units, both moved in the space of queries and keys.

    A unit's share is the sum of its parts' shares; the sum that shares are of is taken over whole
    units. The descriptor of a part is its mean key plus a linear map of mean, largest and smallest
    key, a map for each modality and head; queries alike. Maps start at zero: untrained, it is the
    pooled score of the parts.

        s(t, u) = bias[m(t), m(u), distance(t, u)]
            + log mean_s [ sum_c n_uc exp(scale q_s . k_uc) / sum_u' n_u' exp(scale q_s . k_u') ]

    with moved means q_s of query pools and k_uc of the C parts of a unit, and k_u their mean. A
    method of this project.

    Args:
        num_query_heads, num_kv_heads, head_dim: H, K, D of the layer.
        parts: C, which divides 16.
        modalities: which have maps of their own; tokens of others count with their means, video
            with the map of IMAGE where there is one. None: one map that all share.
        pairs: a bias per pair of modalities and distance; without, per distance only.
    """

    head_dims = MappingProxyType(
        {"query_map": 1, "key_map": 1, "pair_bias": 0, "query_size": 0, "key_size": 0}
    )

    def __init__(
        self,
        *,
        num_query_heads: int,
        num_kv_heads: int,
        head_dim: int,
        parts: int = 4,
        modalities: Sequence[Modality] | None = tuple(Modality),
        pairs: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(num_query_heads, num_kv_heads, head_dim=head_dim, parts=parts)
        if 16 % parts:
            raise ValueError(f"parts must divide 16, the smallest unit, got {parts}")
        self.num_query_heads, self.num_kv_heads = num_query_heads, num_kv_heads
        self.head_dim, self.parts = head_dim, parts
        own = None if modalities is None else tuple(Modality(m) for m in modalities)
        if own is not None and (not own or len(set(own)) < len(own)):
            raise ValueError(f"modalities must be one or more, each once, got {modalities!r}")
        if not isinstance(pairs, bool):
            raise TypeError(f"pairs must be a bool, got {pairs!r}")
        self.modalities, self.pairs = own, pairs
        kinds, bias_kinds = 1 if own is None else len(own), len(Modality) if pairs else 1
        self.query_map = nn.Parameter(torch.zeros(kinds, num_query_heads, 3 * head_dim, head_dim))
        self.key_map = nn.Parameter(torch.zeros(kinds, num_kv_heads, 3 * head_dim, head_dim))
        self.pair_bias = nn.Parameter(
            torch.zeros(num_kv_heads, bias_kinds, bias_kinds, DISTANCE_BUCKETS)
        )
        self.register_buffer("query_size", torch.ones(num_query_heads, 3 * head_dim))
        self.register_buffer("key_size", torch.ones(num_kv_heads, 3 * head_dim))
        self._places = [_place(kind, own) for kind in Modality]
        self.register_buffer("map_of", torch.tensor(self._places), persistent=False)
        self._kept = WeightCache()

    def init_args(self) -> dict[str, Any]:
        own = self.modalities
        return {
            "num_query_heads": self.num_query_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "parts": self.parts,
            "modalities": None if own is None else [m.name for m in own],
            "pairs": self.pairs,
        }

    @classmethod
    def from_init_args(cls, **args: Any) -> FineScorer:
        if args.get("modalities") is not None:
            args["modalities"] = [Modality[name] for name in args["modalities"]]
        return cls(**args)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Also tensors that were stored before there was VIDEO."""
        own = self.modalities
        if own and Modality.VIDEO in own and Modality.IMAGE in own:
            place, image = own.index(Modality.VIDEO), own.index(Modality.IMAGE)
            for name in ("query_map", "key_map"):
                add_video(state_dict, prefix + name, (0,), getattr(self, name), place, image)
        add_video(state_dict, f"{prefix}pair_bias", (1, 2), self.pair_bias)
        super()._load_from_state_dict(state_dict, prefix, *args)

    query_size: Tensor
    """(H, 3 D): root mean squares that features are divided by before they are mapped."""
    key_size: Tensor
    """(K, 3 D)."""
    map_of: Tensor
    """(modalities,): which map each has, -1 for none."""

    def features(self, q: Tensor, k: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """What the maps are given: of tiles (B, H, T, S, 3 D), and of units (B, K, U, C, 3 D)."""
        check_shape(q, k, self.num_query_heads, self.num_kv_heads, self.head_dim)
        query_pools = plan.live_query_pools.shape[2]
        tiles = (plan.tiles, plan.tile_tokens, query_pools, plan.regular_tiles)
        units = (plan.units, plan.unit, self.parts, plan.regular)
        return piece_features(q, *tiles, plan), piece_features(k, *units, plan)

    @torch.no_grad()
    def calibrate(self, tiles: Tensor, units: Tensor) -> None:
        """Set `query_size` and `key_size` to those of a sample's `features`."""
        for size, x in ((self.query_size, tiles), (self.key_size, units)):
            size.copy_(x.float().flatten(2, 3).pow(2).mean((0, 2)).sqrt() + 1e-3)

    def rank(
        self, tiles: Tensor, units: Tensor, plan: Plan, scale: float, dtype: torch.dtype
    ) -> Tensor:
        """(B, K, T, U) scores of `features`; products are taken in `dtype`."""
        parts = self._describe_units(units, plan, scale, dtype)
        return block_scores(self._described(tiles, parts, plan, scale, dtype), plan)

    def _describe_units(
        self, units: Tensor, plan: Plan, scale: float, dtype: torch.dtype
    ) -> Tensor:
        """(B, K, U, C, D)."""
        kind = plan.unit_modality.repeat_interleave(self.parts, 1)
        parts = self._describe(
            units.flatten(2, 3), self._maps(scale, dtype)[1], kind, plan.modalities
        )
        return parts.unflatten(2, (-1, self.parts))

    def _described(
        self, tiles: Tensor, parts: Tensor, plan: Plan, scale: float, dtype: torch.dtype
    ) -> Descriptors:
        """Of features of tiles and of the descriptors of parts of units."""
        query_pools = tiles.shape[3]
        kind = plan.tile_modality.repeat_interleave(query_pools, 1)
        maps = self._maps(scale, dtype)[0]
        tiles = self._describe(tiles.flatten(2, 3), maps, kind, plan.tile_modalities)
        return Descriptors(
            tiles.unflatten(2, (-1, query_pools)).to(dtype),
            None if self.parts > 1 else parts.squeeze(3).to(dtype),
            plan.live_query_pools,
            self.pair_bias.expand(-1, len(Modality), len(Modality), -1),
            parts.to(dtype) if self.parts > 1 else None,
        )

    def describe(
        self, q: Tensor, k: Tensor, plan: Plan, scale: float, cache: DescriptorCache | None = None
    ) -> Descriptors:
        check_shape(q, k, self.num_query_heads, self.num_kv_heads, self.head_dim)

        def describe_units(part: Plan) -> Tensor:
            features = piece_features(k, part.units, part.unit, self.parts, part.regular, part)
            return self._describe_units(features, part, scale, q.dtype)

        query_pools = plan.live_query_pools.shape[2]
        tiles = piece_features(
            q, plan.tiles, plan.tile_tokens, query_pools, plan.regular_tiles, plan
        )
        return self._described(
            tiles, cached_descriptors(k, plan, describe_units, cache), plan, scale, q.dtype
        )

    def _maps(self, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """From features to descriptors, (modalities + 1, heads, 3 D, D), the last for no modality.

        The mean itself, the size of features and `scale` are in them: one product describes a
        piece. Who only ranks gets them in `dtype`, made once.
        """
        if torch.is_grad_enabled():
            return self._made(scale)
        own = (self.query_map, self.key_map, self.query_size, self.key_size)
        return self._kept.get(
            own, (scale, dtype), lambda: tuple(x.to(dtype) for x in self._made(scale))
        )

    def _made(self, scale: float) -> tuple[Tensor, Tensor]:
        made = []
        for maps, size in ((self.query_map, self.query_size), (self.key_map, self.key_size)):
            mean = torch.eye(3 * self.head_dim, self.head_dim, device=maps.device, dtype=maps.dtype)
            mean = mean.expand(1, len(size), -1, -1)
            made.append(torch.cat([maps / size[..., None] + mean, mean]))
        return made[0] * scale, made[1]

    def _describe(
        self, x: Tensor, maps: Tensor, modality: Tensor, present: frozenset[int]
    ) -> Tensor:
        if self.modalities is None:
            return x.to(maps.dtype) @ maps[0]
        return describe(x, maps, self.map_of, self._places, modality, present)


def _place(kind: Modality, own: tuple[Modality, ...] | None) -> int:
    """Which map a modality has, -1 for none."""
    if own is None:
        return 0
    if kind == Modality.VIDEO and kind not in own:
        # Files of scorers were trained with frames as images.
        kind = Modality.IMAGE
    return own.index(kind) if kind in own else -1

"""Keep the best units of every tile, under budgets and floors.

B batch, H query heads, K KV heads, N query tokens, M key tokens, T tiles, U units, L list length
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm_sparse.config import SparseConfig
from mm_sparse.kernels.reference import dense_mask, transpose_lists
from mm_sparse.kernels.sizes import index_dtype
from mm_sparse.layout import Plan, TokenLayout
from mm_sparse.modality import Modality
from mm_sparse.selection.block_lists import mask_to_lists
from mm_sparse.selection.density import count_pairs
from mm_sparse.selection.sampling import Sample, sample_rest
from mm_sparse.selection.scores import Runs, Scores
from mm_sparse.selection.topk import fits_registers, topk_kernel, topk_lists


@dataclass(frozen=True, eq=False)
class Selection:
    """For each (batch, KV head, tile): the kept units, ascending, and their number."""

    index: Tensor
    """(B, K, T, L) unit ids, int16 where they fit, else int32; -1 from `count` on."""
    count: Tensor
    """(B, K, T) int32."""
    plan: Plan
    sample: Sample | None = None
    """What of the lists stands for units that are not kept; None if `config.sample_ratio` is 0."""

    def __post_init__(self) -> None:
        plan = self.plan
        lists = (plan.tiles.shape[0], plan.tiles.shape[1])
        index_types = {torch.int32, index_dtype(plan.units.shape[1])}
        for name, value, rank, types in (
            ("index", self.index, 4, index_types),
            ("count", self.count, 3, {torch.int32}),
        ):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            if value.dim() != rank or value.dtype not in types:
                wanted = " or ".join(sorted(str(kind).removeprefix("torch.") for kind in types))
                raise ValueError(
                    f"{name} must be {wanted} with {rank} dimensions, "
                    f"got {value.dtype} {tuple(value.shape)}"
                )
            if (value.shape[0], value.shape[2]) != lists:
                raise ValueError(
                    f"{name} must have {lists[0]} rows and {lists[1]} tiles as the plan has, "
                    f"got {tuple(value.shape)}"
                )
        if self.count.shape[1] != self.index.shape[1]:
            raise ValueError(
                f"count must have index's {self.index.shape[1]} heads, got {self.count.shape[1]}"
            )

    @property
    def num_query_heads(self) -> int:
        """H."""
        return self.index.shape[1] * self.plan.group

    @classmethod
    def from_mask(cls, kept: Tensor, plan: Plan) -> Selection:
        """Selection of the units where `kept` (B, K, T, U) is True."""
        num_units = plan.units.shape[1]
        if kept.dtype != torch.bool or kept.dim() != 4 or kept.shape[3] != num_units:
            raise ValueError(
                f"kept must be bool (batch, KV heads, tiles, {num_units}), "
                f"got {kept.dtype} {tuple(kept.shape)}"
            )
        most = int(kept.sum(-1).max()) if kept.shape[:3].numel() else 0
        return cls(*mask_to_lists(kept, max(most, 1)), plan)

    def check(self) -> Selection:
        """Refuse lists that are not ascending ids of units in range (reads the whole index)."""
        slot = torch.arange(self.index.shape[-1], device=self.index.device)
        listed = slot < self.count[..., None]
        num_units = self.plan.units.shape[1]
        if bool(((self.index < 0) | (self.index >= num_units)).logical_and(listed).any()):
            raise ValueError(f"index must hold unit ids in [0, {num_units}) up to count")
        if bool(((self.count < 0) | (self.count > self.index.shape[-1])).any()):
            raise ValueError(f"count must be in [0, {self.index.shape[-1]}]")
        falls = (self.index[..., 1:] <= self.index[..., :-1]) & listed[..., 1:]
        if bool(falls.any()):
            raise ValueError("index must ascend within each list")
        return self

    def to_dense_mask(self) -> Tensor:
        """(B, H, N, M) bool: the law that `attend` follows; for tests and small inputs.

        Queries and keys stand as `plan.layout` has them, as they do in `to_block_mask`.
        """
        plan = self.plan
        mask = dense_mask(
            plan.tiles, plan.units, plan.span, self.index, self.count, plan.layout.length
        )
        return mask.repeat_interleave(plan.group, dim=1)

    def to_block_mask(self, block_size: int = 128) -> Any:
        """The same mask as a `BlockMask` of FlexAttention (torch.nn.attention.flex_attention)."""
        from mm_sparse.selection.flex_mask import block_mask

        if self.sample is not None:
            raise ValueError("to_block_mask cannot weigh keys, config.sample_ratio must be 0")
        return block_mask(self.index, self.count, self.plan, block_size)

    def transpose(self) -> tuple[Tensor, Tensor]:
        """Tiles that keep each unit, as `kernels.transpose.transpose_lists` returns them."""
        plan = self.plan
        return transpose_lists(
            plan.tiles, plan.units, plan.span, self.index, self.count, plan.tile_tokens, plan.unit
        )

    def density(self) -> float:
        """Kept visible query-key pairs over visible pairs; 1.0 where nothing is visible."""
        kept, seen = (x.sum().item() for x in count_pairs(self.index, self.count, self.plan))
        return kept / seen if seen else 1.0

    def density_by_modality(self) -> dict[tuple[Modality, Modality], float]:
        """The same by (query modality, key modality), for pairs that occur."""
        kept, seen = count_pairs(self.index, self.count, self.plan)
        return {
            (a, b): (kept[a, b] / seen[a, b]).item()
            for a in Modality
            for b in Modality
            if seen[a, b] > 0
        }


def select(
    scores: Scores | Tensor,
    layout: TokenLayout,
    config: SparseConfig,
    *,
    num_query_heads: int | None = None,
    num_queries: int | None = None,
    query_offset: int | None = None,
) -> Selection:
    """Keep the best units of every tile within the budget of `config`.

    What is always kept (sinks, window) comes first, then the best units of each modality up to
    its floor, then the best of the rest, to the nearest unit. Only visible units compete. Of those
    that lose, `config.sample_ratio` of the budget keeps an even sample.

    Args:
        scores: what a scorer returned, or (B, K, T, U) values with `num_query_heads` (K if None),
            `num_queries` and `query_offset` as in `TokenLayout.plan`.
    Raises:
        ValueError, TypeError: scores that are not those of layout and config; the message says how.

    Example:
        >>> scores = mms.PooledScorer()(q, k, layout=layout, config=config)
        >>> selection = mms.select(scores, layout, config)
        >>> out = mms.attend(q, k, v, selection)
    """
    if isinstance(scores, Tensor):
        if scores.dim() != 4:
            raise ValueError(
                f"scores must be (batch, KV heads, tiles, units), got {tuple(scores.shape)}"
            )
        plan = layout.plan(
            config,
            num_query_heads=num_query_heads or scores.shape[1],
            num_kv_heads=scores.shape[1],
            num_queries=num_queries,
            query_offset=query_offset,
        )
        values = scores
    elif not isinstance(scores, Scores):
        raise TypeError(f"scores must be Scores or a tensor, got {type(scores).__name__}")
    else:
        plan, values = scores.plan, scores.values
        if plan.layout is not layout:
            raise ValueError("layout must be the one that scores were computed for, got another")
        if plan.config != config:
            raise ValueError(
                f"config must be the one that scores were computed for, {plan.config}, got {config}"
            )
    runs = None if isinstance(scores, Tensor) else scores.runs
    units = plan.units.shape[1] if runs is None else runs.index.shape[3] * runs.size
    want = (layout.batch, plan.tiles.shape[1], units)
    if (values.shape[0], *values.shape[2:]) != want:
        raise ValueError(
            f"scores must be (batch, KV heads, tiles, units) = "
            f"({want[0]}, *, {want[1]}, {want[2]}), got {tuple(values.shape)}"
        )
    if values.device != layout.device:
        raise ValueError(f"scores must be on {layout.device} as layout is, got {values.device}")
    return select_units(values.detach(), plan, runs)


def select_units(values: Tensor, plan: Plan, runs: Runs | None = None) -> Selection:
    """`select` on scores that were checked: (B, K, T, U), or those of the units of `runs`."""
    if plan.without_sample is plan:
        return Selection(*topk_lists(values, plan, runs), plan)
    if fits_registers(values, plan.without_sample) and plan.without_sample.max_kept:
        index, count, drawn = topk_kernel(values, plan)
        if drawn is not None:
            sample = Sample(index, count, drawn.index, drawn.count, drawn.weight)
            return Selection(drawn.all_index, drawn.all_count, plan, sample)
    index, count, sample = sample_rest(*topk_lists(values, plan.without_sample), plan)
    return Selection(index, count, plan, sample)

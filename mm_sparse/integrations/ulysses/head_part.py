"""One attention layer of which a process has some heads, and all tokens of them.

H query heads, K KV heads of all processes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mm_sparse.config import SparseConfig
from mm_sparse.integrations.ulysses.exchange import Group
from mm_sparse.scorers import Scorer, ScorerPart


class HeadPart:
    """The heads of a layer that a process of a group has.

    Args:
        name: of the layer.
        heads: H and K.
        group: of P processes.
        copies: processes that have the same KV head.
    """

    def __init__(self, name: str, heads: tuple[int, int], group: Group, copies: int = 1) -> None:
        self.name, self.heads, self.group = name, heads, group
        self.size, self.copies = group.size(), copies
        self.parts = self.size // copies
        """Of the heads."""
        self.part = group.rank() // copies
        self._part: ScorerPart | None = None

    @property
    def share(self) -> tuple[int, int] | None:
        """Number and count of the shares of queries; None where the process attends for all."""
        return None

    def attend(
        self, forward: Callable[..., Any], module: nn.Module, q: Tensor, k: Tensor, v: Tensor,
        mask: Any, options: dict[str, Any],
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """The call of a layer."""
        return forward(module, q, k, v, mask, by_heads=True, **options)

    def scorer_of(self, scorer: Scorer) -> Scorer:
        """The scorer of the heads of this process."""
        if next(scorer.parameters(), None) is None:
            return scorer
        part = self._part
        if part is None or part.whole is not scorer:
            part = self._part = ScorerPart(scorer, self.heads, self.part, self.parts)
        return part

    def config_of(self, config: SparseConfig) -> SparseConfig:
        """The config of a layer for the heads of this process.

        Raises:
            ValueError: keys are sampled, by numbers that heads have among all.
        """
        if config.sample_ratio:
            raise ValueError(
                f"config.sample_ratio must be 0 where heads are split between ranks, got "
                f"{config.sample_ratio:g}"
            )
        return config.of_heads(self.part, self.parts)

    def total(self, count: Tensor) -> Tensor:
        """Sum of a number over the processes."""
        count = count.clone()
        dist.all_reduce(count, group=self.group)
        return count

    def of_first_rank(self, number: int) -> int:
        """A number that the first process has."""
        given = [number]
        source = dist.get_global_rank(self.group, 0)
        dist.broadcast_object_list(given, source, group=self.group)
        return given[0]


def tensor_parallel_part(name: str, module: nn.Module, heads: tuple[int, int]) -> HeadPart | None:
    """The heads that tensor parallelism has left to this process; None without it.

    A product behind attention whose weight is split by its input (`rowwise`) says so: transformers'
    `tp_plan`, and `parallelize_module` of torch. FSDP splits weights by their output.

    Args:
        name: of the layer.
        module: computes attention.
        heads: H and K.

    Raises:
        ValueError: the processes do not divide the KV heads.
    """
    for child in module.children():
        weight = getattr(child, "weight", None)
        if not isinstance(weight, DTensor) or weight.dim() != 2:
            continue
        for dim, placement in enumerate(weight.placements):
            if not placement.is_shard(1):
                continue
            group = weight.device_mesh.get_group(dim)
            if heads[1] % group.size():
                raise ValueError(
                    f"{name} cannot run tensor-parallel: {group.size()} processes do not divide "
                    f"its {heads[1]} KV heads"
                )
            return HeadPart(name, heads, group)
    return None

"""Which implementation serves given tensors."""

from __future__ import annotations

from torch import Tensor

from mm_sparse.kernels.device import interpreted, runs_triton
from mm_sparse.kernels.ops import DTYPES
from mm_sparse.layout import Plan

# Rows of a tile (query pools times query heads of a group) that the kernel takes.
MOST_ROWS = 128


def fused(x: Tensor, plan: Plan) -> bool:
    """Whether kernels score and select: on a GPU, or where a config asks for the interpreter."""
    if not runs_triton(x, plan.config.backend) or x.dtype not in DTYPES or not x.numel():
        return False
    return (x.is_cuda or interpreted()) and plan.group * min(
        plan.config.query_pools, plan.tile_tokens
    ) <= MOST_ROWS


def last_contiguous(x: Tensor) -> Tensor:
    """As kernels read it: a copy only if the head dim is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()

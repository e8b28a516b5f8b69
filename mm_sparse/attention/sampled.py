"""Exact attention on a selection with an importance-weighted sample of the remainder.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim, L list length
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_sparse._backend import fused
from mm_sparse.kernels import ops
from mm_sparse.kernels.ops import attend_backward_op
from mm_sparse.layout import Plan
from mm_sparse.selection import Sample


def attend_sampled(
    q: Tensor, k: Tensor, v: Tensor, sample: Sample, plan: Plan, scale: float
) -> Tensor:
    """Softmax attention in which a key of the sample counts `sample.weight` times (as a log)."""
    return _Attend.apply(q, k, v, sample, plan, scale)  # type: ignore[return-value]


class _Attend(torch.autograd.Function):
    """Two lists, one softmax: outputs are merged by their log-sum-exps.

    A backward pass needs of the softmax its output and its log-sum-exp alone, so each list runs its
    own with those of the whole.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sample: Sample, plan: Plan, scale: float
    ) -> Tensor:
        log = of_queries(sample.weight, plan)
        options = scale, plan.config.backend, plan.deterministic
        lists = plan.block_lists(sample.best_index, sample.best_count)
        best, seen = ops.attend(q, k, v, lists, *options)
        lists = plan.block_lists(sample.index, sample.count)
        other, sampled = ops.attend(q, k, v, lists, *options)
        out, whole = _merge(best, other, seen, sampled, log, plan)
        ctx.save_for_backward(q, k, v, out, whole, whole - log)
        ctx.own = sample, plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, out, whole, shifted = ctx.saved_tensors
        sample, plan, scale = ctx.own
        dout = grads[0]
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        options = scale, plan.config.backend, plan.deterministic
        gradients = []
        for log, index, count in (
            (whole, sample.best_index, sample.best_count),
            (shifted, sample.index, sample.count),
        ):
            lists = plan.block_lists(index, count)
            gradients.append(attend_backward_op(dout, q, k, v, out, log, *lists, *options))
        return (*(a + b for a, b in zip(*gradients, strict=True)), None, None, None)


def _merge(
    best: Tensor, other: Tensor, seen: Tensor, sampled: Tensor, log: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """The output on both lists and its log-sum-exp; a kernel merges them where kernels select."""
    if fused(best, plan):
        from mm_sparse.kernels.triton.merge_outputs import merge_outputs

        return merge_outputs(best, other, seen, sampled, log)
    sampled = sampled + log
    whole = torch.logaddexp(seen, sampled)
    # Where nothing is seen both are -inf, and so is their sum.
    share = (sampled - whole).exp().nan_to_num(0.0)[..., None].to(_wide(best))
    out = torch.lerp(best.to(share.dtype), other.to(share.dtype), share)
    return out.to(best.dtype), whole


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def of_queries(value: Tensor, plan: Plan) -> Tensor:
    """(B, K, T) of tiles -> (B, H, N) of their queries."""
    of_tiles = value.gather(2, plan.tile_of[:, None].expand(-1, value.shape[1], -1))
    return of_tiles if plan.group == 1 else of_tiles.repeat_interleave(plan.group, 1)

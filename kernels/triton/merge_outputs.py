"""Outputs of softmax attention on two lists of keys become the output on both.

B batch, H query heads, N query tokens, D head dim
"""

# Triton launches are subscripts of a jit function, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_sparse.kernels.cached_launch import launch
from mm_sparse.kernels.sizes import cdiv, next_power_of_2
from mm_sparse.kernels.triton.primitives import COUNTS


@triton.jit(do_not_specialize=COUNTS)
def _merge_outputs(
    Out, Other, Log, OtherLog, Weight, Whole, rows, heads, queries,
    stride_b, stride_h, stride_n, other_b, other_h, other_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    there = row < rows
    first = tl.load(Log + row, mask=there, other=-float("inf"))
    second = tl.load(OtherLog + row, mask=there, other=-float("inf"))
    second += tl.load(Weight + row, mask=there, other=0.0)
    most = tl.maximum(first, second)
    # Where nothing is seen both are -inf.
    base = tl.where(most == -float("inf"), 0.0, most)
    one, two = tl.exp(first - base), tl.exp(second - base)
    total = one + two
    seen = total > 0
    whole = base + tl.log(tl.where(seen, total, 1.0))
    tl.store(Whole + row, tl.where(seen, whole, -float("inf")), mask=there)
    share = tl.where(seen, two / tl.where(seen, total, 1.0), 0.0)
    column = tl.arange(0, BLOCK_D)
    mask = there[:, None] & (column < D)[None]
    b, h, n = row // queries // heads, row // queries % heads, row % queries
    at = (b * stride_b + h * stride_h + n * stride_n)[:, None] + column[None]
    from_ = (b * other_b + h * other_h + n * other_n)[:, None] + column[None]
    out = tl.load(Out + at, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(Other + from_, mask=mask, other=0.0).to(tl.float32)
    out += (other - out) * share[:, None]
    tl.store(Out + at, out.to(Out.dtype.element_ty), mask=mask)


def merge_outputs(
    out: Tensor, other: Tensor, log: Tensor, other_log: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention on both lists, in the place of `out`, and its log-sum-exp.

    Args:
        out, other: (B, H, N, D), the last dimension contiguous.
        log, other_log: (B, H, N) float32, natural log-sum-exps, -inf where nothing was seen.
        weight: (B, H, N) float32, log of how often a key of the other list counts.
    """
    whole = torch.empty_like(log)
    dim = out.shape[-1]
    block_d = next_power_of_2(dim)
    block_r = max(4096 // block_d, 1)
    grid = (cdiv(log.numel(), block_r),)
    logs = (log.contiguous(), other_log.contiguous(), weight.contiguous(), whole)
    launch(
        _merge_outputs, grid,
        out, other, *logs, log.numel(), *log.shape[1:], *out.stride()[:3], *other.stride()[:3],
        D=dim, BLOCK_D=block_d, BLOCK_R=block_r,
    )  # fmt: skip
    return out, whole

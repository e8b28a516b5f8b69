"""All-to-alls between a split by tokens and a split by heads, with gradients.

"DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer
Models" (https://arxiv.org/abs/2309.14509).

P ranks, B batch, H heads of all ranks, h = H / P, N tokens of all ranks, n = N / P, D head dim
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup


def tokens_to_heads(q: Tensor, k: Tensor, v: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Some tokens of all heads (B, H, n, D) to all tokens of some heads (B, h, N, D).

    Two collectives: q travels while k and v are laid side by side.
    """
    return _TokensToHeads.apply(q, k, v, group)  # pyright: ignore[reportReturnType]


def heads_to_tokens(out: Tensor, group: Group) -> Tensor:
    """Output of attention: all tokens of some heads (B, N, h, D) to (B, n, H, D)."""
    return _HeadsToTokens.apply(out, group)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """Parts of all ranks behind each other along a dimension; without gradients."""
    ranks = group.size()
    parts = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(parts, x.contiguous(), group=group)
    return parts.unflatten(0, (ranks, -1)).movedim(0, dim).flatten(dim, dim + 1)


class _TokensToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: Group) -> tuple[Tensor, ...]:
        ctx.group = group
        return _exchange_all(_by_head_owner, _join_tokens, q, k, v, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        # One node for all three: every rank takes the collectives back in the same order.
        q, k, v = grads
        return *_exchange_all(_by_token_owner, _join_heads, q, k, v, ctx.group), None


class _HeadsToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, group: Group) -> Tensor:
        ctx.group = group
        sent = _by_token_owner(out.transpose(1, 2), group.size())
        ranks, batch, heads, tokens, dim = sent.shape
        received = _all_to_all(sent.contiguous(), group)[0]
        # (P, B, h, n, D) to (B, n, P, h, D)
        return received.permute(1, 3, 0, 2, 4).reshape(batch, tokens, ranks * heads, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        sent = _by_head_owner(grad.transpose(1, 2), ctx.group.size())
        received = _all_to_all(sent.contiguous(), ctx.group)[0]
        return _join_tokens(received).transpose(1, 2), None


def _exchange_all(
    part: Any, join: Any, q: Tensor, k: Tensor, v: Tensor, group: Group
) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors in two collectives, cut by `part` and put together by `join`."""
    size = group.size()
    received, work = _all_to_all(part(q, size).contiguous(), group, wait=False)
    # Different dtypes meet in the wider one and come back as they were.
    both = torch.cat([part(k, size), part(v, size)], -1)
    other = _all_to_all(both.contiguous(), group)[0]
    work.wait()
    keys, values = other.split([k.shape[-1], v.shape[-1]], -1)
    return join(received), join(keys).to(k.dtype), join(values).to(v.dtype)


def _all_to_all(sent: Tensor, group: Group, wait: bool = True) -> tuple[Tensor, Any]:
    """(P, ...), entry p for rank p, to (P, ...), entry p of rank p."""
    received = torch.empty_like(sent)
    work = dist.all_to_all_single(received, sent, group=group, async_op=not wait)
    return received, work


def _by_head_owner(x: Tensor, ranks: int) -> Tensor:
    """(B, H, n, D) to (P, B, h, n, D)."""
    return x.unflatten(1, (ranks, -1)).movedim(1, 0)


def _by_token_owner(x: Tensor, ranks: int) -> Tensor:
    """(B, h, N, D) to (P, B, h, n, D)."""
    return x.unflatten(2, (ranks, -1)).movedim(2, 0)


def _join_tokens(x: Tensor) -> Tensor:
    """(P, B, h, n, D) to (B, h, N, D)."""
    return x.movedim(0, 2).flatten(2, 3).contiguous()


def _join_heads(x: Tensor) -> Tensor:
    """(P, B, h, n, D) to (B, H, n, D)."""
    return x.movedim(0, 1).flatten(1, 2).contiguous()

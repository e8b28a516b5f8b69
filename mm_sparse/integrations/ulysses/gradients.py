"""Gradients of the processes of a group, added up in few collectives."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BUCKET_BYTES = 25 << 20
"""Of a flat buffer of gradients, as DDP has it."""
IN_FLIGHT = 2
"""Buffers that travel at once: what they hold is in memory twice."""


@torch.no_grad()
def sum_gradients(
    parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None = None, *,
    divisor: int = 1, bucket_bytes: int = BUCKET_BYTES,
) -> None:  # fmt: skip
    """Add up gradients over the processes of a group; each calls it with the same parameters.

    They travel in flat buffers ("PyTorch Distributed: Experiences on Accelerating Data Parallel
    Training", https://arxiv.org/abs/2006.15704). A parameter that no process used keeps no
    gradient.

    Args:
        parameters: those that take no gradient, or come twice, are left out.
        group: all processes if None.
        divisor: of the sums; the number of processes gives means.
        bucket_bytes: of a buffer; a larger gradient travels alone.

    Raises:
        ValueError: a parameter is sharded, whose gradient FSDP has reduced.
    """
    wanted = [p for p in {id(p): p for p in parameters}.values() if p.requires_grad]
    if not wanted:
        return
    if any(isinstance(p, DTensor) for p in wanted):
        raise ValueError("parameters must not be sharded, got a DTensor: FSDP reduces it")
    used = torch.tensor([p.grad is not None for p in wanted], dtype=torch.int32)
    used = used.to(wanted[0].device)
    dist.all_reduce(used, group=group)
    grads = [_gradient_of(p) for p, count in zip(wanted, used.tolist(), strict=True) if count]
    pending: deque[tuple[Any, Tensor, list[Tensor]]] = deque()
    for bucket in _buckets(grads, bucket_bytes):
        alone = len(bucket) == 1 and bucket[0].is_contiguous()
        flat = bucket[0] if alone else torch.cat([grad.flatten() for grad in bucket])
        work = dist.all_reduce(flat, group=group, async_op=True)
        pending.append((work, flat, [] if alone else bucket))
        if len(pending) == IN_FLIGHT:
            _finish(*pending.popleft())
    while pending:
        _finish(*pending.popleft())
    if divisor != 1:
        for grad in grads:
            grad.div_(divisor)


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    """Its gradient as a dense tensor; zeros where another process alone used it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.is_sparse:
        parameter.grad = parameter.grad.to_dense()
    return parameter.grad


def _buckets(grads: list[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Gradients of one dtype and device together, so many bytes of them."""
    kinds: dict[Any, list[Tensor]] = {}
    for grad in grads:
        kinds.setdefault((grad.dtype, grad.device), []).append(grad)
    for own in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for grad in own:
            if bucket and size + grad.nbytes > most:
                yield bucket
                bucket, size = [], 0
            bucket.append(grad)
            size += grad.nbytes
        yield bucket


def _finish(work: Any, flat: Tensor, bucket: list[Tensor]) -> None:
    """Wait for a buffer, and give gradients what is theirs of it."""
    work.wait()
    for grad, own in zip(bucket, flat.split([g.numel() for g in bucket]) if bucket else (),
                         strict=True):  # fmt: skip
        grad.copy_(own.view_as(grad))

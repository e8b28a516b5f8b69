"""Gradients kept small where some weights are sharded and others whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm


def clip_gradients(
    parameters: Iterable[nn.Parameter], most: float, kind: str | None = None
) -> None:
    """Clip gradients by their norm over all parameters of all processes, or by their values.

    Args:
        parameters: sharded ones (DTensor), whole ones, whose gradients are the same everywhere, or
            both.
        most: norm, or absolute value.
        kind: "norm" or "value"; None for "norm".
    """
    with_grad = [p for p in parameters if p.grad is not None]
    # A fused operator takes tensors of one kind.
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for p in with_grad:
        by_mesh.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
    kinds = list(by_mesh.values())
    if kind == "value":
        for own in kinds:
            clip_grad_value_(own, most)
        return
    norms = [_whole_norm([p.grad for p in own if p.grad is not None]) for own in kinds]
    if not norms:
        return
    total = torch.linalg.vector_norm(torch.stack(norms))
    for own in kinds:
        clip_grads_with_norm_(own, most, total)


def _whole_norm(grads: list[Tensor]) -> Tensor:
    norm = get_total_norm(grads)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm

"""What stands in for `scaled_dot_product_attention` while a tower is timed.

B batch, H heads, N query tokens, M key tokens, D head dim
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CORE = "scaled_dot_product_attention"


@contextmanager
def core(replacement: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, modules that look attention up in `torch.nn.functional` find `replacement`.

    An attribute costs nothing at each call, unlike a mode that sees every function.

    Raises:
        ValueError: nothing in the block asked for attention by that name.
    """
    functional: Any = torch.nn.functional
    own, calls = getattr(functional, CORE), 0

    def count(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return replacement(*args, **kwargs)

    setattr(functional, CORE, count)
    try:
        yield
    finally:
        setattr(functional, CORE, own)
    if not calls:
        raise ValueError(f"the tower must call torch.nn.functional.{CORE}, it never did")


class FreeAttention:
    """Attention that costs nothing: the values of the first call of a shape, whatever came."""

    def __init__(self) -> None:
        self._made: dict[Any, Tensor] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """(B, H, N, D), strided as FlashAttention's result is, so that what follows copies none."""
        if query.shape != value.shape:
            want, got = tuple(query.shape), tuple(value.shape)
            raise ValueError(f"value must have the shape of query, {want}, got {got}")
        kind = query.shape, value.dtype, value.device
        if kind not in self._made:
            self._made[kind] = value.detach().transpose(1, 2).contiguous().transpose(1, 2)
        return self._made[kind]


def eager(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """softmax(QK)V with logits and weights, (B, H, N, M) each, in memory.

    Raises:
        MemoryError: there is no room for both.
        NotImplementedError: there is more to it than that.
    """
    if attn_mask is not None or is_causal or dropout_p:
        raise NotImplementedError("eager attention is timed without masks and dropout")
    if query.is_cuda:
        need = 2 * query.shape[:-1].numel() * key.shape[-2] * query.element_size()
        room = room_on(query.device)
        if need > room:
            gib = f"{need / 2**30:.1f} GiB for logits and weights, {room / 2**30:.1f} GiB are free"
            raise MemoryError(f"eager attention needs {gib}")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return ((query * factor) @ key.transpose(-1, -2)).softmax(-1) @ value


def room_on(device: torch.device) -> int:
    """Bytes of a GPU that torch could still hand out."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

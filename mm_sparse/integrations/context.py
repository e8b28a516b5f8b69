"""Other attention in the place of a sparsified model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from mm_sparse.integrations.call import Call
from mm_sparse.integrations.patching import layers


@contextmanager
def attending(model: nn.Module, instead: Callable[[Call], Tensor]) -> Iterator[None]:
    """Have the layers that would run sparse attend by `instead`, around a block.

    It gets a call without scores and selection, and gives (B, H, N, D) in the order of
    `call.layout`. Gradients pass.
    """
    shared = next(iter(layers(model).values())).shared
    before, shared.instead = shared.instead, instead
    try:
        yield
    finally:
        shared.instead = before

"""The KV cache of a model whose heads are split between ranks: each keeps the keys of its own.

B batch, K KV heads, N tokens of a call, D head dim
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_sparse.integrations.sparse_cache.sparse_cache import SparseCache


class SplitCache:
    """The cache of the running forward; its layers are given their keys once heads are split.

    The first call of a sequence splits its tokens between ranks; those after it, which have few,
    are whole on every rank, and attend with the heads of which a rank has the keys.
    """

    def __init__(self) -> None:
        self.cache: Any = None
        """None where no cache is kept, as in training."""
        self.tokens = 0
        """N."""
        self.is_step = False
        """Whether the cache held keys before this call, or the call has one token."""
        self._asked: tuple[Any, ...] | None = None

    @property
    def is_prefill(self) -> bool:
        """Whether this is the first call of a sequence."""
        return self.cache is not None and not self.is_step

    def begin(self, cache: Any, tokens: int) -> None:
        """Before the forward of a model.

        Raises:
            ValueError: gradients are computed, or the cache is of a kind that does not grow.
        """
        self.end()
        if torch.is_grad_enabled():
            raise ValueError(
                "past_key_values must be None where tokens are split between ranks and gradients "
                "are computed: generate under `torch.no_grad()`"
            )
        if isinstance(cache, SparseCache) or getattr(cache, "is_compileable", False):
            raise ValueError(
                "past_key_values must be a cache that grows and keeps all keys where heads are "
                f"split between ranks, DynamicCache for one, got {type(cache).__name__}"
            )
        self.is_step = tokens == 1 or cache.get_seq_length() > 0
        self.cache, self.tokens = cache, tokens
        cache.update = self._ask

    def end(self) -> None:
        """After it, in whatever way it ended."""
        if self.cache is not None:
            vars(self.cache).pop("update", None)
        self.cache, self._asked = None, None

    def _ask(self, k: Tensor, v: Tensor, *more: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """In place of the cache's `update`: keys and values as they came, of all heads."""
        self._asked = more, options
        return k, v

    def store(self, name: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, N, D) of this rank's heads, and those that are kept before them.

        Args:
            name: of the layer.

        Raises:
            ValueError: the layer keeps none.
        """
        if self._asked is None:
            raise ValueError(
                f"{name} must keep keys of its own for heads to be split between ranks, it takes "
                "those of another layer"
            )
        (more, options), self._asked = self._asked, None
        return type(self.cache).update(self.cache, k, v, *more, **options)

"""One attention layer whose heads are split between ranks while it attends.

B batch, H query heads, K KV heads, n tokens of a rank, D head dim
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mm_sparse.integrations.layer import LAYER
from mm_sparse.integrations.ulysses.exchange import (
    Group,
    gather,
    heads_to_tokens,
    tokens_to_heads,
)
from mm_sparse.integrations.ulysses.head_part import HeadPart
from mm_sparse.integrations.ulysses.split_cache import SplitCache


class HeadSplit(HeadPart):
    """What a rank of a group does of the attention of a layer: all tokens of some KV heads.

    Where there are more ranks than KV heads, R ranks have the same head and its query heads, and
    each attends for a share of the queries, in whole tiles: what is selected stays as it is.

    Args:
        name: of the layer.
        heads: H and K.
        group: its size P divides K, or K divides P.
        cache: keys that are kept for steps of decoding.

    Raises:
        ValueError: heads and ranks do not divide each other.
    """

    def __init__(
        self, name: str, heads: tuple[int, int], group: Group, cache: SplitCache | None = None
    ) -> None:
        size = group.size()
        if size % heads[1] and heads[1] % size:
            raise ValueError(
                f"{name} cannot be split by heads: {heads[1]} KV heads and {size} ranks do not "
                "divide each other"
            )
        # R, ranks that have the same KV head.
        super().__init__(name, heads, group, size // min(size, heads[1]))
        self.cache = SplitCache() if cache is None else cache
        copies = self.copies
        self._share = (group.rank() % copies, copies) if copies > 1 else None

    @property
    def share(self) -> tuple[int, int] | None:
        return None if self.cache.is_step and self.cache.cache is not None else self._share

    def attend(
        self, forward: Callable[..., Any], module: nn.Module, q: Tensor, k: Tensor, v: Tensor,
        mask: Any, options: dict[str, Any],
    ) -> tuple[Tensor, None]:  # fmt: skip
        """(B, n, H, D): the call of a layer with the tokens of this rank, its mask that of all."""
        found, cache = (q.shape[1], k.shape[1]), self.cache
        tokens = q.shape[2] * self.size if cache.cache is None else cache.tokens
        if found != self.heads:
            raise ValueError(
                f"{self.name} must be called with {self.heads} query and KV heads, got {found}"
            )
        for option in ("s_aux", "head_mask", "position_bias", "attention_bias"):
            if options.get(option) is not None:
                raise ValueError(f"{self.name} needs `{option}`, which is not split by heads")
        if cache.cache is not None and cache.is_step:
            return self._step(forward, module, q, k, v, mask, options), None
        shape = tuple(mask.shape[-2:]) if isinstance(mask, Tensor) else (tokens, tokens)
        if k.shape[2] != q.shape[2] or shape != (tokens, tokens):
            raise ValueError(
                f"{self.name} must be given a mask of all {tokens} tokens of {self.size} ranks and "
                f"as many keys as queries, got a mask of {shape}, {q.shape[2]} queries and "
                f"{k.shape[2]} keys"
            )
        if self.share is None:
            q, k, v = self._of_tokens(*tokens_to_heads(q, k, v, self.group))
            out, _ = forward(module, q, k, v, mask, by_heads=True, **options)
            return heads_to_tokens(self._padded(out), self.group), None
        kv_heads, copies = self.heads[1], self.copies
        q = q.unflatten(1, (kv_heads, -1)).repeat_interleave(copies, 1).flatten(1, 2)
        k, v = (x.repeat_interleave(copies, 1) for x in (k, v))
        q, k, v = self._of_tokens(*tokens_to_heads(q, k, v, self.group))
        out, _ = forward(module, q, k, v, mask, by_heads=True, **options)
        record = getattr(module, LAYER).record
        if record.kept is None:
            # Not by score, select, attend: the output of all queries.
            out = self._own_tokens(out)
        out = heads_to_tokens(self._padded(out), self.group)
        # One rank has the output of a query, the others zeros.
        return out.unflatten(2, (kv_heads, copies, -1)).sum(3).flatten(2, 3), None

    def _step(
        self, forward: Callable[..., Any], module: nn.Module, q: Tensor, k: Tensor, v: Tensor,
        mask: Any, options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """(B, N, H, D) of tokens that every rank has, by the heads of which each has the keys."""
        q, k, v = (
            x.narrow(1, self.part * (x.shape[1] // self.parts), x.shape[1] // self.parts)
            for x in (q, k, v)
        )
        k, v = self.cache.store(self.name, k.contiguous(), v.contiguous())
        out, _ = forward(module, q.contiguous(), k, v, mask, by_heads=True, **options)
        heads = gather(out, self.group, 2)
        if self.copies > 1:
            heads = heads.unflatten(2, (self.parts, self.copies, -1))[:, :, :, 0].flatten(2, 3)
        return heads.contiguous()

    def _of_tokens(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Without the padding that makes a prompt divisible; its keys are kept."""
        if not self.cache.is_prefill:
            return q, k, v
        q, k, v = (x[:, :, : self.cache.tokens].contiguous() for x in (q, k, v))
        return q, *self.cache.store(self.name, k, v)

    def _padded(self, out: Tensor) -> Tensor:
        """(B, N, h, D) with zeros behind the last token of a prompt, for an even split."""
        missing = -out.shape[1] % self.size
        return pad(out, (0, 0, 0, 0, 0, missing)) if missing and self.cache.is_prefill else out

    def _own_tokens(self, out: Tensor) -> Tensor:
        """(B, N, h, D) with zeros for the tokens of other shares."""
        number, count = self.share or (0, 1)
        own = torch.arange(out.shape[1], device=out.device) * count // out.shape[1] == number
        return out * own[:, None, None]

"""A layer of a cache that has room for the tokens to come, so that steps can be one CUDA graph.

B batch, K KV heads, M keys that are held, C keys that a prefill left, R tokens to come, D head dim
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_sparse.integrations.sparse_cache.layers import SparseCacheLayer


class FixedSparseCacheLayer(SparseCacheLayer):
    """After a prefill, its tensors have a size and an address of their own and steps write to them.

    Keys and values are (B, K, C + R, D) then, and how many of them are written is known to the
    device only. Another prefill that leaves as many keys finds the same addresses.

    Args:
        room: R.
        window: new tokens from which on a forward is a prefill, whose keys are released.
    """

    def __init__(self, room: int, window: int) -> None:
        super().__init__()
        self.room, self.window = room, window
        self.fixed = False
        """Whether the size is fixed."""
        self.released = 0
        """How many tokens have no key, once the size is fixed."""
        self.left = 0
        """C, once the size is fixed."""
        self._buffers: dict[str, Tensor] = {}
        """By name: keys, values, and the numbers of tokens so far and of keys, () int64."""

    @property
    def is_compileable(self) -> bool:  # pyright: ignore
        """Whether the size is fixed."""
        return self.fixed

    @property
    def seen(self) -> int:
        return int(self._buffers["seen"]) if self.fixed else self._seen

    @property
    def held(self) -> int:
        return int(self._buffers["held"]) if self.fixed else super().held

    def fix(self) -> None:
        """After a prefill: make room for the tokens to come."""
        held, seen = self.held, self.seen
        for name in ("keys", "values"):
            grown = getattr(self, name)
            whole = self._buffer(name, (*grown.shape[:2], held + self.room, grown.shape[-1]), grown)
            whole[:, :, :held] = grown
            whole[:, :, held:] = 0
            setattr(self, name, whole)
        for name, value in (("seen", seen), ("held", held)):
            self._buffer(name, (), self.keys, torch.int64).fill_(value)
        self.released, self.left, self.fixed = seen - held, held, True

    def _buffer(
        self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        known, dtype = self._buffers.get(name), dtype or like.dtype
        same = known is not None and known.shape == shape and known.dtype == dtype
        if known is None or not same or known.device != like.device:
            # Written to in every mode of autograd.
            with torch.inference_mode(False):
                known = self._buffers[name] = torch.empty(shape, dtype=dtype, device=like.device)
            torch._dynamo.mark_static_address(known)
        return known

    def _grow_again(self) -> None:
        """Before another prefill: as it would be without a fixed size."""
        held, self._seen = self.held, self.seen
        self.keys, self.values = self.keys[:, :, :held], self.values[:, :, :held]
        self.fixed = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        new = key_states.shape[-2]
        if self.fixed and new >= self.window:
            self._grow_again()
        if not self.fixed:
            return super().update(key_states, value_states, *args, **kwargs)
        place = torch.arange(new, device=self.keys.device) + self._buffers["held"]
        # In place, all of it: a graph knows addresses.
        self._buffers["held"].add_(new)
        self._buffers["seen"].add_(new)
        self.keys.index_copy_(2, place, key_states)
        self.values.index_copy_(2, place, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        return self._buffers["seen"] if self.fixed else self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if not self.fixed or query_length >= self.window:
            return super().get_mask_sizes(query_length)
        return self.keys.shape[-2], self.released

    def get_max_length(self) -> int:
        return self.keys.shape[-2] + self.released if self.fixed else -1

    def crop(self, tokens_to_remove: int) -> None:
        if not self.fixed:
            super().crop(tokens_to_remove)
            return
        remove = self._removable(tokens_to_remove)
        # What is beyond the length is written over.
        self._buffers["held"].sub_(remove)
        self._buffers["seen"].sub_(remove)

    def reorder_cache(self, beam_idx: Any) -> None:
        self._move(super().reorder_cache, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._move(super().batch_repeat_interleave, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._move(super().batch_select_indices, indices)

    def _move(self, change: Any, by: Any) -> None:
        """Rows in another order stay where a graph reads them; another number of rows cannot."""
        change(by)
        for name in ("keys", "values") if self.fixed else ():
            moved = getattr(self, name)
            setattr(self, name, self._buffer(name, tuple(moved.shape), moved).copy_(moved))

    def reset(self) -> None:
        super().reset()
        self.fixed, self.released, self.left = False, 0, 0

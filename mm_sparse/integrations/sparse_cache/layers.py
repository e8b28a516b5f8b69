"""A layer of a cache from which keys are taken out, while positions go on.

B batch, K KV heads, M keys that are held, C keys that stay, D head dim
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class SparseCacheLayer(DynamicLayer):
    """Keys and values of a layer; `release` makes them fewer.

    A head may hold others than the next one, but all hold equally many. They stand in the order of
    their positions, padding first, and new ones behind them.
    """

    keys: Any
    """(B, K, M, D)."""
    values: Any
    """(B, K, M, width of values)."""

    def __init__(self) -> None:
        super().__init__()
        self._seen = 0
        self.positions: Tensor | None = None
        """(B, K, C) int32, true positions of what the last release left; None before the first."""
        self.newest = 0
        """How many of these, at the end, are the last positions in every head."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.held} of {self.seen} keys)"

    @property
    def seen(self) -> int:
        """Tokens so far, released ones included: the position of the next one."""
        return self._seen

    @property
    def held(self) -> int:
        """M."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._seen += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def release(self, places: Tensor, newest: int) -> None:
        """Keep the keys at these places and give the memory of the others back.

        Args:
            places: (B, K, C) int64, ascending.
            newest: how many of them, at the end, are the last places in every head.
        """
        self.positions = self.true_positions().gather(-1, places)
        self.newest = newest
        for name in ("keys", "values"):
            whole = getattr(self, name)
            index = places[..., None].expand(*places.shape, whole.shape[-1])
            # A tensor of its own: a view would hold all of the memory.
            setattr(self, name, whole.gather(-2, index))

    def true_positions(self) -> Tensor:
        """(B, K, M) int32, positions of the keys in the sequence."""
        batch, heads = self.keys.shape[:2]
        held = self.held
        known = None if self.positions is None else self.positions[..., :held]
        missing = held - (0 if known is None else known.shape[-1])
        place = torch.arange(
            self.seen - missing, self.seen, dtype=torch.int32, device=self.keys.device
        ).expand(batch, heads, -1)
        return place if known is None else torch.cat([known, place], -1)

    def get_seq_length(self) -> Any:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # What is held stands where as many newest tokens would: in a row that is padded on the
        # left, as many of those are padding as of what is held.
        return self.held + query_length, self.seen - self.held

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens out again.

        Raises:
            ValueError: some of them are released, so that heads hold different ones.
        """
        remove = self._removable(tokens_to_remove)
        if remove == 0:
            return
        appended = self.held - (0 if self.positions is None else self.positions.shape[-1])
        self.keys = self.keys[..., :-remove, :]
        self.values = self.values[..., :-remove, :]
        self._seen -= remove
        if self.positions is not None and remove > appended:
            self.positions = self.positions[..., : appended - remove]
            self.newest -= remove - appended

    def _removable(self, tokens_to_remove: int) -> int:
        """How many tokens `crop` takes out; an error if it cannot."""
        remove = -tokens_to_remove
        if tokens_to_remove > 0:
            # A length, as it was before transformers 5.18.
            remove = max(0, self.seen - tokens_to_remove)
        known = 0 if self.positions is None else self.positions.shape[-1] - self.newest
        if remove > self.held - known:
            raise ValueError(
                f"tokens_to_remove must be at most {self.held - known}, the newest tokens of "
                f"which every head holds the key, got {remove}: those before them are released"
            )
        return remove

    def reset(self) -> None:
        self.keys = self.values = self.positions = None
        self.is_initialized, self._seen, self.newest = False, 0, 0

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        if self.positions is not None:
            self.positions = self.positions.index_select(0, beam_idx.to(self.positions.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.positions is not None:
            self.positions = self.positions.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.positions is not None:
            self.positions = self.positions[indices]

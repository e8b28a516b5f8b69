"""What an attention call asks for beside q, k, v and a mask, in the words of no library."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class AttentionOptions:
    """Options of one attention call; an adapter fills them in from its library's arguments."""

    scale: float | None = None
    """Factor on q.k; 1 / sqrt(head dim) if None."""
    is_causal: bool | None = None
    """Whether a call without a mask is causal; None leaves it to the module."""
    dropout: float = 0.0
    """Of attention weights, while training."""
    sliding_window: int | None = None
    """Keys that a query sees behind itself, of a call without a mask."""
    cu_seqlens: Tensor | None = None
    """Bounds of the sequences of a packed row, (sequences + 1,)."""
    need_weights: bool = False
    """Whether the caller wants the attention weights."""
    cross: bool = False
    """Whether the keys are those of another sequence."""
    unsupported: str | None = None
    """What the call needs that sparse attention does not know."""

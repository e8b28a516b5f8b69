"""Dense attention within the sequences of a packed row, in few calls however many there are.

R sequences of a row, N tokens, H query heads, K KV heads, D head dim
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Up to so many lengths, the sequences of each are one batch; beyond, lengths share padded batches.
EXACT_LENGTHS = 8
# The shortest sequence of a padded batch, as a share of the longest.
SHORTEST = 0.75
DTYPES_OF_VARLEN = (torch.float16, torch.bfloat16)


Part = tuple[Tensor, Tensor]
"""Tokens of some sequences, (N',) int64, and the bounds of these sequences behind one another."""


@dataclass(frozen=True, eq=False)
class PackedBounds:
    """Where the sequences of a packed row begin and end."""

    bounds: Tensor
    """(R + 1,) int32: where each sequence begins, and where the last ends."""
    lengths: tuple[int, ...]
    """Of the sequences that have tokens."""

    @classmethod
    def of(cls, bounds: Tensor) -> PackedBounds:
        """Bounds as models hand them over; read from the device once for each tensor."""
        held = getattr(bounds, "_mm_sparse_bounds", None)
        # Of use to a backward pass is only what was not made in inference mode.
        inference = torch.is_inference_mode_enabled()
        version = inference, None if bounds.is_inference() else bounds._version
        if held is None or held[0] != version:
            places = bounds.tolist()
            if bounds.dim() != 1 or len(places) < 2 or places[0] != 0 or sorted(places) != places:
                raise ValueError(
                    "bounds of packed sequences must be numbers of tokens from 0 on, one for each "
                    f"sequence and one for the end, got {places[:8]} ..."
                )
            lengths = [b - a for a, b in pairwise(places) if b > a]
            made = cls(bounds.to(torch.int32), tuple(lengths))
            held = bounds._mm_sparse_bounds = (version, made)  # pyright: ignore
        return held[1]

    @cached_property
    def tokens(self) -> int:
        """N, of all sequences."""
        return sum(self.lengths)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence; 0 if there is none."""
        return max(self.lengths, default=0)

    @cached_property
    def shortest(self) -> int:
        """Tokens of the shortest sequence; 0 if there is none."""
        return min(self.lengths, default=0)

    def split(self, least: int) -> tuple[Part, Part, Tensor]:
        """The sequences of `least` tokens and more, the shorter ones, and the way back.

        The way back is where each token stands once the two are laid behind one another, (N,).
        """
        if least not in self._splits:
            lengths = torch.tensor(self.lengths)
            long = lengths >= least
            of_token = long.repeat_interleave(lengths)
            parts = self._part(lengths[long], of_token), self._part(lengths[~long], ~of_token)
            self._splits[least] = (*parts, torch.cat([tokens for tokens, _ in parts]).argsort())
        return self._splits[least]

    @cached_property
    def _splits(self) -> dict[int, tuple[Part, Part, Tensor]]:
        return {}

    def _part(self, lengths: Tensor, of_token: Tensor) -> Part:
        device = self.bounds.device
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device, torch.int32)
        return of_token.nonzero()[:, 0].to(device), bounds

    @cached_property
    def batches(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """Tokens of each batch, (R', L) int64, and where they are padding, None if nowhere.

        A padded batch names the last token of a sequence again and again.
        """
        return tuple(self._batches())

    @cached_property
    def place(self) -> Tensor:
        """(N,) int64: where the token stands once the batches are laid one behind the other."""
        places, at = self.bounds.new_empty(self.tokens, dtype=torch.int64), 0
        for tokens, padding in self.batches:
            own = torch.arange(at, at + tokens.numel(), device=tokens.device).view(tokens.shape)
            at += tokens.numel()
            kept = slice(None) if padding is None else ~padding
            places[tokens[kept].flatten()] = own[kept].flatten()
        return places

    def _batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        device = self.bounds.device
        lengths = torch.tensor(self.lengths)
        starts = lengths.cumsum(0) - lengths
        for longest, members in _groups(self.lengths):
            own = torch.tensor(members)
            position = torch.arange(longest)
            last = lengths[own, None] - 1
            tokens = starts[own, None] + position.minimum(last)
            padding = position > last
            some = bool(padding.any())
            yield tokens.to(device), padding.to(device) if some else None


def _groups(lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Longest length and numbers of the sequences that share a batch."""
    by_length: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        by_length.setdefault(length, []).append(number)
    exact = len(by_length) <= EXACT_LENGTHS
    longest, members = 0, list[int]()
    for length in sorted(by_length, reverse=True):
        if members and (exact or length < SHORTEST * longest):
            yield longest, members
            members = []
        longest = longest if members else length
        members = members + by_length[length]
    if members:
        yield longest, members


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: PackedBounds,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of every token of one row to its own sequence, all keys of it.

    Args:
        q: (1, H, N, D).
        k, v: (1, K, N, D).
        packed: the sequences of the row.
        causal: whether a token sees no later ones.
        scale: of the logits, D ** -0.5 if None.
        dropout: probability of dropping an attention weight.
    Returns:
        (1, N, H, D).
    Raises:
        ValueError: the bounds are not those of one row of N tokens.
    """
    if len(q) != 1 or q.shape[2] != packed.tokens or k.shape[2] != packed.tokens:
        raise ValueError(
            f"q and k must be one row of the {packed.tokens} tokens that the bounds cut, got "
            f"{len(q)} rows of {q.shape[2]} and {k.shape[2]}"
        )
    if not packed.tokens:
        return q.transpose(1, 2)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (N, H, D) each
    count = len(packed.lengths)
    if packed.longest == packed.shortest:
        q, k, v = (x.unflatten(0, (count, packed.longest)) for x in (q, k, v))
        return _batch_attention(q, k, v, None, causal, scale, dropout).flatten(0, 1)[None]
    if not dropout and _served_by_varlen(q, v):
        return _varlen_attention(q, k, v, packed, causal, scale)[None]
    parts = []
    for tokens, padding in packed.batches:
        # A causal query sees no padding, which stands behind its sequence.
        seen = None if padding is None or causal else ~padding[:, None, None]
        out = _batch_attention(q[tokens], k[tokens], v[tokens], seen, causal, scale, dropout)
        parts.append(out.flatten(0, 1))
    return torch.cat(parts)[packed.place][None]


def _batch_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, scale: float | None,
    dropout: float,
) -> Tensor:  # fmt: skip
    """(R, L, H, D) from tensors of that order."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=causal, scale=scale, dropout_p=dropout,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2)


def _served_by_varlen(q: Tensor, v: Tensor) -> bool:
    """Whether torch's attention of variable lengths takes the tensors."""
    width = q.shape[-1]
    return (
        q.device.type == "cuda"
        and torch.version.hip is None
        and q.dtype in DTYPES_OF_VARLEN
        and width % 8 == 0
        and width <= 256
        and v.shape[-1] == width
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedBounds, causal: bool, scale: float | None
) -> Tensor:
    """(N, H, D) from tensors of that order."""
    # Imported here: torch loads its kernels of variable lengths with the module.
    from torch.nn.attention.varlen import varlen_attn

    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    options: dict[str, Any] = {"window_size": (-1, 0)} if causal else {}
    bounds, longest = packed.bounds, packed.longest
    out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, **options)
    return out

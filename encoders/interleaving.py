"""What an encoder says of its tokens, and several of them as one sequence with its layout.

B batch, N tokens of a part, M tokens of a row, E width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mm_sparse.layout import TokenLayout
from mm_sparse.modality import Modality


@dataclass(frozen=True, eq=False)
class TokenSpec:
    """The part of a `TokenLayout` that (B, N, E) tokens of one modality make up."""

    modality: Modality
    grid: tuple[int, ...] | None = None
    """Sides in tokens, without the prefix: (height, width) of an image, whose tokens go row by row,
    or (frames, height, width) of a video."""
    prefix: int = 0
    """Class and register tokens in front."""
    rate: float | None = None
    """Frames of audio in a second (Hz)."""
    lengths: Tensor | None = None
    """(B,) tokens of each row that are no padding, prefix included; None where there is none."""
    document: int = 0
    """Tokens attend to those of the same document only."""

    def __post_init__(self) -> None:
        if not isinstance(self.modality, Modality):
            raise TypeError(f"modality must be a Modality, got {self.modality!r}")
        pictures = (Modality.IMAGE, Modality.VIDEO)
        for name, kinds in (("grid", pictures), ("rate", (Modality.AUDIO,))):
            value = getattr(self, name)
            if value is not None and self.modality not in kinds:
                raise ValueError(f"{name} must be None for {self.modality.name}, got {value!r}")
        for name in ("prefix", "document"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an int of at least 0, got {value!r}")
        if self.lengths is None:
            return
        if not isinstance(self.lengths, Tensor) or self.lengths.dim() != 1:
            raise ValueError(f"lengths must be a (B,) tensor, got {self.lengths!r}")
        if self.grid is not None:
            raise ValueError(
                f"lengths must be None for {self.modality.name} with a grid, whose rows are whole"
            )

    @property
    def seconds(self) -> Tensor | None:
        """(B,) seconds of audio in each row; None where rate or lengths are not known."""
        return None if self.rate is None or self.lengths is None else self.lengths / self.rate

    def check(self, tokens: Tensor) -> None:
        """Refuse (B, N, E) tokens that the spec does not describe."""
        if not isinstance(tokens, Tensor) or tokens.dim() != 3:
            shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else tokens
            raise ValueError(f"tokens must be (B, N, E), got {shape!r}")
        rows, count = tokens.shape[:2]
        if self.grid is not None and count != self.prefix + prod(self.grid):
            raise ValueError(
                f"grid must cover the tokens, got {self.prefix} in front and {self.grid} "
                f"for {count} tokens"
            )
        if self.prefix > count:
            raise ValueError(f"prefix must be at most the {count} tokens, got {self.prefix}")
        if self.lengths is None:
            return
        if len(self.lengths) != rows:
            raise ValueError(f"lengths must be for {rows} rows, got {len(self.lengths)}")
        short, long = self.lengths.min().item(), self.lengths.max().item()
        if short < self.prefix or long > count:
            raise ValueError(f"lengths must be in [{self.prefix}, {count}], got {short} to {long}")

    def spans(self, count: int) -> list[tuple[Any, ...]]:
        """What `TokenLayout.from_rows` takes, for so many tokens of one row."""
        kind, behind = self.modality.name.lower(), count - self.prefix
        spans = [(kind, self.prefix, self.document)] if self.prefix else []
        size = behind if self.grid is None else self.grid
        return [*spans, (kind, size, self.document)] if behind else spans


def text_spec(lengths: Tensor | None = None, document: int = 0) -> TokenSpec:
    """The spec of embedded text; `lengths` (B,) where rows are padded behind."""
    return TokenSpec(Modality.TEXT, lengths=lengths, document=document)


Part = tuple[Tensor, TokenSpec]


def interleave(parts: Sequence[Part], *, padding_side: str = "right") -> tuple[Tensor, TokenLayout]:
    """Put parts of one batch behind one another, in every row in the same order.

    Padding inside the parts is left out; rows are padded once, to the longest.

    Args:
        parts: (B, N, E) embeddings and the spec that describes them, in order.
        padding_side: "right", or "left" as for generation.
    Returns:
        (B, M, E) embeddings, zero on padding, and their layout.
    """
    parts = [_checked(part) for part in parts]
    if not parts:
        raise ValueError("parts must hold at least one (embeddings, spec), got none")
    batches = {len(tokens) for tokens, _ in parts}
    if len(batches) > 1:
        raise ValueError(f"parts must have as many rows each, got {sorted(batches)}")
    rows = [[_row(tokens, spec, b) for tokens, spec in parts] for b in range(batches.pop())]
    return interleave_rows(rows, padding_side=padding_side)


def interleave_rows(
    rows: Sequence[Sequence[Part]], *, padding_side: str = "right"
) -> tuple[Tensor, TokenLayout]:
    """The same where each row has parts of its own, with embeddings of batch 1: (1, N, E)."""
    if padding_side not in ("left", "right"):
        raise ValueError(f'padding_side must be "left" or "right", got {padding_side!r}')
    checked = [[_checked(part) for part in row] for row in rows]
    all_tokens = [tokens for row in checked for tokens, _ in row]
    if not all_tokens:
        raise ValueError("rows must hold at least one (embeddings, spec), got none")
    for name, values in (
        ("rows", {len(tokens) for tokens in all_tokens} | {1}),
        ("width", {tokens.shape[2] for tokens in all_tokens}),
        ("device", {str(tokens.device) for tokens in all_tokens}),
        ("dtype", {str(tokens.dtype) for tokens in all_tokens}),
    ):
        if len(values) > 1:
            raise ValueError(
                f"embeddings of all parts must have the same {name}"
                f"{' (1 each)' if name == 'rows' else ''}, got {sorted(values)}"
            )
    spans, sequences = [], []
    for row in checked:
        unpadded = [_row(tokens, spec, 0) for tokens, spec in row]
        spans.append([span for tokens, spec in unpadded for span in spec.spans(tokens.shape[1])])
        # A row without parts is all padding.
        sequences.append(
            torch.cat([t[0] for t, _ in unpadded]) if unpadded else all_tokens[0][0, :0]
        )
    embeddings = pad_sequence(sequences, batch_first=True, padding_side=padding_side)
    layout = TokenLayout.from_rows(spans, padding_side, device=embeddings.device)
    return embeddings, layout


def _checked(part: Part) -> Part:
    if not isinstance(part, tuple) or len(part) != 2 or not isinstance(part[1], TokenSpec):
        raise TypeError(f"a part must be (embeddings, Piece), got {type(part).__name__}")
    part[1].check(part[0])
    return part


def _row(tokens: Tensor, spec: TokenSpec, row: int) -> Part:
    """One row of a part, (1, N, E), without its padding."""
    if spec.lengths is None:
        return tokens[row : row + 1], spec
    length = int(spec.lengths[row])
    return tokens[row : row + 1, :length], replace(spec, lengths=None)

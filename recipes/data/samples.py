"""A conversation with pictures and sounds, and the batch that a model trains on.

B rows, L tokens of the longest row, I pictures of all rows, h x w grid of image tokens of a
picture, A sounds of all rows, S samples of the longest sound
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import TypedDict

from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100
RATE = 16_000
"""Samples of a sound in a second."""


@dataclass(frozen=True)
class Turn:
    """What one side says: text, pictures and sounds in reading order."""

    pieces: tuple[str | Tensor, ...]
    """Text, pictures (3, height, width) in [0, 1], and sounds (samples,) of 16 kHz in [-1, 1]."""
    answer: bool = False
    """Whether the model learns to say this turn."""
    asked: tuple[int, int, int, int] | None = None
    """Pixels (top, left, bottom, right) of the picture that the question is about, if known."""

    def __post_init__(self) -> None:
        for piece in self.pieces:
            if isinstance(piece, Tensor) and piece.ndim == 1:
                if not piece.is_floating_point() or not len(piece):
                    raise ValueError(
                        "pieces: a sound must be a float tensor (samples,) of at least one, "
                        f"got {piece.dtype} {tuple(piece.shape)}"
                    )
            elif isinstance(piece, Tensor):
                if piece.ndim != 3 or piece.shape[0] != 3 or not piece.is_floating_point():
                    raise ValueError(
                        "pieces: a picture must be a float tensor (3, height, width), "
                        f"got {piece.dtype} {tuple(piece.shape)}"
                    )
            elif not isinstance(piece, str):
                raise TypeError(f"pieces must be str or Tensor, got {type(piece).__name__}")
        if self.answer and any(isinstance(piece, Tensor) for piece in self.pieces):
            kind = next(
                "sound" if p.ndim == 1 else "picture" for p in self.pieces if isinstance(p, Tensor)
            )
            raise ValueError(f"pieces: an answer must be text, got a {kind} in it")


@dataclass(frozen=True)
class Sample:
    """A conversation; `name` says where it comes from in errors and logs."""

    turns: tuple[Turn, ...]
    name: str = ""

    @property
    def pictures(self) -> list[Tensor]:
        return [p for p in self._tensors() if p.ndim == 3]

    @property
    def sounds(self) -> list[Tensor]:
        return [p for p in self._tensors() if p.ndim == 1]

    def _tensors(self) -> list[Tensor]:
        return [p for turn in self.turns for p in turn.pieces if isinstance(p, Tensor)]


class Samples(Dataset[Sample], ABC):
    """A data set of samples with a length: what `recipes.data.datamodule.SampleData` reads."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    def size(self, index: int) -> float | None:
        """How long a sample is, in any measure and without reading it; None if nobody knows."""
        return None


class ConcatSamples(Samples):
    """Samples of several sets, one set after the other: what is easy first.

    With `SampleData(shuffle=False)` it is a course, shuffled a mixture. Sizes of pictures may
    differ from set to set if every set but the last fills whole batches.
    """

    def __init__(self, parts: list[Samples], times: list[int] | None = None) -> None:
        """`times`: how often each set comes, one after the other; once if None."""
        if not parts:
            raise ValueError("parts must hold at least one set of samples, got none")
        times = [1] * len(parts) if times is None else times
        if len(times) != len(parts) or min(times) < 1:
            raise ValueError(
                f"times must be a number of at least 1 for each of {len(parts)} parts, got {times}"
            )
        self.parts = [part for part, often in zip(parts, times, strict=True) for _ in range(often)]
        self.ends = list(accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        part, place = self._place(index)
        return part[place]

    def size(self, index: int) -> float | None:
        part, place = self._place(index)
        return part.size(place)

    def _place(self, index: int) -> tuple[Samples, int]:
        number = bisect_right(self.ends, index)
        return self.parts[number], index - (self.ends[number - 1] if number else 0)


@dataclass(frozen=True)
class Template:
    """Text around the turns. The end-of-text token follows an answer and is learned with it."""

    question: tuple[str, str] = ("", "")
    """Before and after a turn that is read."""
    answer: tuple[str, str] = ("", "")
    """Before an answer, and after its end-of-text token."""

    def __post_init__(self) -> None:
        for name in ("question", "answer"):
            value = tuple(getattr(self, name))
            if len(value) != 2 or not all(isinstance(text, str) for text in value):
                raise ValueError(f"{name} must be two strings (before, after), got {value!r}")
            object.__setattr__(self, name, value)


CHATML = Template(("<|im_start|>user\n", "<|im_end|>\n"), ("<|im_start|>assistant\n", "\n"))


class Batch(TypedDict):
    """Rows are padded on the right."""

    input_ids: Tensor
    """(B, L) int64; a picture is h * w times the image token, a sound is audio tokens."""
    labels: Tensor
    """(B, L) int64, equal to `input_ids` on answers and -100 elsewhere; not shifted."""
    attention_mask: Tensor
    """(B, L) bool, False on padding."""
    position_ids: Tensor
    """(B, L) int64, from 0 on in every sample of the row: that is where a document starts."""
    answer_index: Tensor
    """(B, L) int64: which answer of the batch a label belongs to, -1 elsewhere."""
    pixel_values: Tensor
    """(I, 3, height, width) in [0, 1]: the pictures of row 0, then of row 1, ... (I may be 0)."""
    image_grids: list[tuple[int, int]]
    """(h, w) of every picture, in the order of `pixel_values`."""
    waveforms: Tensor
    """(A, S) float32 of 16 kHz, zeros behind the end: the sounds of row 0, then of row 1, ..."""
    sound_lengths: Tensor
    """(A,) int64 samples of every sound."""
    answers: list[str]
    """Text of the answers, in the order of `answer_index`."""
    dropped: int
    """Samples that were left out because they were too long; B may be 0."""

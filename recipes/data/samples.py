"""A conversation with images and audio, and the batch that a model trains on.

B rows, L tokens of the longest row, I images of all rows, h x w grid of image tokens of a
image, A audio clips of all rows, S samples of the longest clip
"""

import logging
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import TypedDict

from torch import Tensor
from torch.utils.data import Dataset

logger = logging.getLogger(__name__)
IGNORED = -100
RATE = 16_000
"""Samples of an audio clip in a second."""


@dataclass(frozen=True)
class Turn:
    """What one side says: text, images and audio in reading order."""

    content: tuple[str | Tensor, ...]
    """Text, images (3, height, width) and videos (frames, 3, height, width) in [0, 1], and audio
    (samples,) of 16 kHz in [-1, 1]."""
    answer: bool = False
    """Whether the model learns to say this turn."""
    asked: tuple[int, int, int, int] | None = None
    """Pixels (top, left, bottom, right) of the picture that the question is about, if known."""
    system: bool = False
    """Whether it instructs the model ahead of the conversation."""

    def __post_init__(self) -> None:
        for part in self.content:
            if isinstance(part, Tensor) and part.ndim == 1:
                if not part.is_floating_point() or not len(part):
                    raise ValueError(
                        "content: an audio clip must be a float tensor (samples,) of at least one, "
                        f"got {part.dtype} {tuple(part.shape)}"
                    )
            elif isinstance(part, Tensor):
                video, is_float = part.ndim == 4, part.is_floating_point()
                if part.ndim not in (3, 4) or part.shape[-3] != 3 or not is_float:
                    shape = "(frames, 3, height, width)" if video else "(3, height, width)"
                    raise ValueError(
                        f"content: {'a video' if video else 'an image'} must be a float tensor "
                        f"{shape}, got {part.dtype} {tuple(part.shape)}"
                    )
            elif not isinstance(part, str):
                raise TypeError(f"content must be str or Tensor, got {type(part).__name__}")
        if self.answer and any(isinstance(part, Tensor) for part in self.content):
            kinds = {1: "audio", 3: "an image", 4: "a video"}
            kind = next(kinds[p.ndim] for p in self.content if isinstance(p, Tensor))
            raise ValueError(f"content: an answer must be text, got {kind} in it")


@dataclass(frozen=True)
class Sample:
    """A conversation; `name` says where it comes from in errors and logs."""

    turns: tuple[Turn, ...]
    name: str = ""

    @property
    def images(self) -> list[Tensor]:
        return [p for p in self._tensors() if p.ndim == 3]

    @property
    def audio(self) -> list[Tensor]:
        return [p for p in self._tensors() if p.ndim == 1]

    def _tensors(self) -> list[Tensor]:
        return [p for turn in self.turns for p in turn.content if isinstance(p, Tensor)]


class Samples(Dataset[Sample], ABC):
    """A data set of samples with a length: what `recipes.data.datamodule.SampleData` reads."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    def size(self, index: int) -> float | None:
        """How long a sample is, in any measure and without reading it; None if nobody knows."""
        return None


class MediaError(ValueError):
    """An image or an audio file that cannot be read; the message names it."""


class MediaSamples(Samples):
    """Samples that are read when they are asked for; one with a damaged file is replaced.

    The next readable one takes its place. Each damaged one is named in the log once, with its file
    and row, and counted in `skipped`.
    """

    def __init__(self) -> None:
        self.bad: dict[int, str] = {}
        """What is wrong with each sample that was skipped in this process, by number."""

    @property
    def skipped(self) -> int:
        """Samples that could not be read, of those that were asked for in this process."""
        return len(self.bad)

    @abstractmethod
    def read(self, index: int) -> Sample:
        """The sample of a number in [0, len(self)).

        Raises:
            MediaError: a file of it cannot be read.
        """

    def __getitem__(self, index: int) -> Sample:
        """The sample of a number, or the next one that can be read.

        Raises:
            IndexError: a number out of range.
            MediaError: no sample can be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        for step in range(len(self)):
            number = (index + step) % len(self)
            try:
                return self.read(number)
            except MediaError as error:
                if number not in self.bad:
                    self.bad[number] = str(error)
                    logger.warning("skipped sample %d so far: %s", self.skipped, error)
        raise MediaError(f"none of {len(self)} samples can be read, the first: {self.bad[0]}")


class ConcatSamples(Samples):
    """Samples of several sets, one set after the other: what is easy first.

    With `SampleData(shuffle=False)` it is a course, shuffled a mixture. Sizes of images may
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
"""The chat format of SmolLM2 and Qwen, for a tokenizer whose end of text is `<|im_end|>`."""


class Batch(TypedDict):
    """Rows are padded on the right."""

    input_ids: Tensor
    """(B, L) int64; an image is h * w times the image token, an audio clip is audio tokens."""
    labels: Tensor
    """(B, L) int64, equal to `input_ids` on answers and -100 elsewhere; not shifted."""
    attention_mask: Tensor
    """(B, L) bool, False on padding."""
    position_ids: Tensor
    """(B, L) int64, from 0 on in every sample of the row: that is where a document starts."""
    answer_index: Tensor
    """(B, L) int64: which answer of the batch a label belongs to, -1 elsewhere."""
    pixel_values: Tensor
    """(I, 3, height, width) in [0, 1]: the images of row 0, then of row 1, ... (I may be 0)."""
    image_grids: list[tuple[int, int]]
    """(h, w) of every image, in the order of `pixel_values`."""
    waveforms: Tensor
    """(A, S) float32 of 16 kHz, zeros behind the end: the clips of row 0, then of row 1, ..."""
    audio_lengths: Tensor
    """(A,) int64 samples of every clip."""
    answers: list[str]
    """Text of the answers, in the order of `answer_index`."""
    dropped: int
    """Samples that were left out because they were too long; B may be 0."""

"""A conversation with pictures, and the batch that a model trains on.

B rows, L tokens of the longest row, I pictures of all rows, h x w grid of image tokens of a picture
"""

import logging
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mm_sparse.recipes.vocabulary import Tokenizer

logger = logging.getLogger(__name__)

IGNORED = -100


@dataclass(frozen=True)
class Turn:
    """What one side says: text and pictures in reading order."""

    pieces: tuple[str | Tensor, ...]
    """Text, and pictures (3, height, width) in [0, 1]."""
    answer: bool = False
    """Whether the model learns to say this turn."""

    def __post_init__(self) -> None:
        for piece in self.pieces:
            if isinstance(piece, Tensor):
                if piece.ndim != 3 or piece.shape[0] != 3 or not piece.is_floating_point():
                    raise ValueError(
                        "pieces: a picture must be a float tensor (3, height, width), "
                        f"got {piece.dtype} {tuple(piece.shape)}"
                    )
            elif not isinstance(piece, str):
                raise TypeError(f"pieces must be str or Tensor, got {type(piece).__name__}")
        if self.answer and any(isinstance(piece, Tensor) for piece in self.pieces):
            raise ValueError("pieces: an answer must be text, got a picture in it")


@dataclass(frozen=True)
class Sample:
    """A conversation; `name` says where it comes from in errors and logs."""

    turns: tuple[Turn, ...]
    name: str = ""

    @property
    def pictures(self) -> list[Tensor]:
        return [p for turn in self.turns for p in turn.pieces if isinstance(p, Tensor)]


class Samples(Dataset[Sample], ABC):
    """A data set of samples with a length: what `recipes.data.VLMData` reads."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...


class Course(Samples):
    """Samples of several sets, one set after the other: what is easy first.

    For `VLMData(shuffle=False)`. Sizes of pictures may differ from set to set if every set but the
    last fills whole batches.
    """

    def __init__(self, parts: list[Samples]) -> None:
        if not parts:
            raise ValueError("parts must hold at least one set of samples, got none")
        self.parts = parts
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        number = bisect_right(self.ends, index)
        return self.parts[number][index - (self.ends[number - 1] if number else 0)]


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
    """(B, L) int64; a picture is h * w times the image token."""
    labels: Tensor
    """(B, L) int64, equal to `input_ids` on answers and -100 elsewhere; not shifted."""
    attention_mask: Tensor
    """(B, L) bool, False on padding."""
    answer_index: Tensor
    """(B, L) int64: which answer of the batch a label belongs to, -1 elsewhere."""
    pixel_values: Tensor
    """(I, 3, height, width) in [0, 1]: the pictures of row 0, then of row 1, ... (I may be 0)."""
    image_grids: list[tuple[int, int]]
    """(h, w) of every picture, in the order of `pixel_values`."""
    dropped: int
    """Samples that were left out because they were too long; B may be 0."""


@dataclass
class Encoded:
    """One sample as tokens."""

    ids: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    """Which answer of the sample a token belongs to, -1 elsewhere."""
    grids: list[tuple[int, int]] = field(default_factory=list)
    count: int = 0

    def add(self, ids: list[int], answer: int = -1) -> None:
        self.ids += ids
        self.answers += [answer] * len(ids)


class Collator:
    """Samples to a `Batch`. An over-long sample is dropped whole, counted in `dropped`, and logged.

    With worker processes each has its own count; sum the batches' `dropped` there.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        patch_size: int,
        max_length: int,
        template: Template | None = None,
    ) -> None:
        for name, value in (("patch_size", patch_size), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.tokenizer = tokenizer
        self.patch_size = patch_size
        self.max_length = max_length
        self.template = template or Template()
        self.dropped = 0

    def grid(self, picture: Tensor, name: str) -> tuple[int, int]:
        """Rows and columns of the image tokens of a picture (3, height, width)."""
        height, width = picture.shape[-2:]
        if not height or not width or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"{name}: picture sides must be positive multiples of patch_size="
                f"{self.patch_size}, got {height} x {width}"
            )
        return height // self.patch_size, width // self.patch_size

    def text(self, text: str, name: str) -> list[int]:
        """Token ids of a text, which must not spell the image token."""
        ids = self.tokenizer.encode(text) if text else []
        if self.tokenizer.image_id in ids:
            raise ValueError(f"{name}: text must not contain the image token, got {text!r}")
        return ids

    def encode(self, sample: Sample) -> Encoded:
        """Tokens of a sample, of any length."""
        out = Encoded()
        out.add(list(self.tokenizer.start))
        for turn in sample.turns:
            before, after = self.template.answer if turn.answer else self.template.question
            out.add(self.text(before, sample.name))
            learned = out.count if turn.answer else -1
            for piece in turn.pieces:
                if isinstance(piece, str):
                    out.add(self.text(piece, sample.name), learned)
                else:
                    h, w = self.grid(piece, sample.name)
                    out.grids.append((h, w))
                    out.add([self.tokenizer.image_id] * (h * w))
            if turn.answer:
                out.add([self.tokenizer.eos_id], learned)
                out.count += 1
            out.add(self.text(after, sample.name))
        return out

    def __call__(self, samples: list[Sample]) -> Batch:
        rows: list[Encoded] = []
        pictures: list[Tensor] = []
        for sample in samples:
            row = self.encode(sample)
            if len(row.ids) > self.max_length:
                logger.warning(
                    "dropped sample %s: %d tokens, max_length is %d",
                    sample.name or "without a name",
                    len(row.ids),
                    self.max_length,
                )
                continue
            rows.append(row)
            pictures += sample.pictures
        dropped = len(samples) - len(rows)
        self.dropped += dropped
        sizes = {tuple(picture.shape) for picture in pictures}
        if len(sizes) > 1:
            names = ", ".join(sample.name for sample in samples)
            raise ValueError(f"pictures of a batch must have one size, got {sizes} in {names}")

        shape = (len(rows), max((len(row.ids) for row in rows), default=0))
        input_ids = torch.full(shape, self.tokenizer.pad_id)
        answer_index = torch.full(shape, -1)
        attention_mask = torch.zeros(shape, dtype=torch.bool)
        answers = 0
        for b, row in enumerate(rows):
            length = len(row.ids)
            input_ids[b, :length] = torch.tensor(row.ids)
            attention_mask[b, :length] = True
            index = torch.tensor(row.answers)
            answer_index[b, :length] = torch.where(index >= 0, index + answers, -1)
            answers += row.count
        return Batch(
            input_ids=input_ids,
            labels=torch.where(answer_index >= 0, input_ids, IGNORED),
            attention_mask=attention_mask,
            answer_index=answer_index,
            pixel_values=torch.stack(pictures) if pictures else torch.zeros(0, 3, 0, 0),
            image_grids=[grid for row in rows for grid in row.grids],
            dropped=dropped,
        )

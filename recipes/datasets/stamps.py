"""Real images with captions: the stamps of Tux Paint, as grids with a question.

They come from the Debian package tuxpaint-stamps-default (GPL-2), and are read where it puts them.
Grids are procedural: real images, composed places and questions.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from mm_sparse.recipes.data import MediaSamples, Sample, Turn, on_white, to_tensor

Split = Literal["train", "validation"]
STAMPS = "/usr/share/tuxpaint/stamps"
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]


@dataclass(frozen=True)
class Stamp:
    """One image with its English caption; `category` is its folder below the root."""

    path: Path
    caption: str
    category: str


@lru_cache
def find_stamps(root: str | Path = STAMPS, max_words: int | None = None) -> tuple[Stamp, ...]:
    """All PNG stamps below `root`, sorted by path, with captions of up to `max_words` words."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"root must hold the Tux Paint stamps, {root} is not a folder: "
            "`apt-get install tuxpaint-stamps-default`, or pass the folder that has them"
        )
    stamps: list[Stamp] = []
    for text in sorted(root.rglob("*.txt")):
        image = text.with_suffix(".png")
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        caption = lines[0].strip().rstrip(".") if lines else ""
        fits = max_words is None or len(caption.split()) <= max_words
        if caption and fits and image.is_file():
            stamps.append(Stamp(image, caption, str(text.parent.relative_to(root))))
    if not stamps:
        raise FileNotFoundError(
            f"root must hold PNG stamps with captions, found none below {root}: "
            "`apt-get install tuxpaint-stamps-default`"
        )
    return tuple(stamps)


class StampGrids(MediaSamples):
    """n x n stamps on a canvas, and what is in which row and column.

    What is held out is the arrangement: both splits draw from the same stamps, since a caption that
    was never seen cannot be guessed word by word. Grid `i` of a split and seed is always the same.
    """

    def __init__(
        self,
        split: Split = "train",
        length: int = 100_000,
        *,
        side: int = 4,
        image_size: int = 224,
        questions: int = 4,
        kinds: int | None = None,
        skip: tuple[str, ...] = ("symbols/alphabets",),
        max_words: int | None = 6,
        root: str = STAMPS,
        seed: int = 0,
    ) -> None:
        """`side` stamps a row; `kinds` limits how many different captions there are, of up to
        `max_words` words; `skip` are folders that are left out (an "s" and an "S" of one size look
        the same); `questions` ask for different cells, one turn each."""
        super().__init__()
        check_split(split)
        if not 1 <= side <= len(ORDINALS):
            raise ValueError(f"side must be in [1, {len(ORDINALS)}], got {side}")
        if not 1 <= questions <= side * side:
            raise ValueError(f"questions must be in [1, {side * side}], got {questions}")
        if length < 0:
            raise ValueError(f"length must be at least 0, got {length}")
        if image_size < side:
            raise ValueError(f"image_size must be at least side={side}, got {image_size}")
        stamps = {
            stamp.caption: stamp
            for stamp in find_stamps(root, max_words)
            if not any(Path(stamp.category).is_relative_to(folder) for folder in skip)
        }
        order = np.random.default_rng(0).permutation(sorted(stamps))[:kinds]
        if len(order) < side * side:
            raise ValueError(
                f"kinds must leave at least {side * side} captions, got {len(order)} "
                f"(kinds={kinds}, max_words={max_words})"
            )
        self.stamps = [stamps[str(caption)] for caption in order]
        self.split, self.length, self.seed = split, length, seed
        self.side, self.image_size, self.questions = side, image_size, questions

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, int(self.split == "validation"), index])
        n, cell = self.side, self.image_size // self.side
        chosen = rng.choice(len(self.stamps), n * n, replace=False)
        pixels = np.full((self.image_size, self.image_size, 3), 255, np.uint8)
        for place, kind in enumerate(chosen):
            top, left = place // n * cell, place % n * cell
            stamp = cached_cell(self.stamps[kind].path, cell)
            pixels[top : top + cell, left : left + cell] = stamp
        turns: list[Turn] = []
        for place in rng.permutation(n * n)[: self.questions]:
            row, column = ORDINALS[place // n], ORDINALS[place % n]
            question = f"What is in the {row} row, {column} column?"
            top, left = place // n * cell, place % n * cell
            turns.append(
                Turn(
                    (question,) if turns else (to_tensor(pixels), question),
                    asked=(int(top), int(left), int(top) + cell, int(left) + cell),
                )
            )
            turns.append(Turn((self.stamps[chosen[place]].caption,), answer=True))
        return Sample(tuple(turns), f"stamps/{self.split}/{index}")


@lru_cache(maxsize=1024)
def cached_cell(path: Path, cell: int) -> np.ndarray:
    """A stamp with a margin, in a cell x cell square."""
    return on_white(path, cell, cell, margin=0.1)


def check_split(split: str) -> None:
    if split not in ("train", "validation"):
        raise ValueError(f"split must be 'train' or 'validation', got {split!r}")

"""Real images with real spoken captions: Tux Paint's stamps, several in one sequence.

They come from the Debian package tuxpaint-stamps-default (GPL-2). Which images and captions stand
together is composed.
"""

from pathlib import Path

import numpy as np
import torch

from mm_sparse.recipes.data import (
    RATE,
    SPLITS,
    MediaSamples,
    Sample,
    Split,
    Turn,
    WordTokenizer,
    check_split,
    on_white,
    read_audio,
    split_of,
    to_tensor,
)
from mm_sparse.recipes.datasets.stamps import STAMPS, Stamp, find_stamps


class YesNoTokenizer(WordTokenizer):
    """The words of the question and its answers."""

    def __init__(self) -> None:
        super().__init__(["is", "this", "it", "?", "yes", "no"])


class SpokenStamps(MediaSamples):
    """Image, spoken caption, "is this it?", yes or no; several of these in one sample.

    Half of the captions belong to another stamp of the split. Captions of the splits differ.
    """

    def __init__(
        self,
        split: Split = "train",
        length: int = 10_000,
        *,
        pairs: int = 3,
        image_size: int = 64,
        seconds: float = 2.0,
        root: str = STAMPS,
        seed: int = 0,
    ) -> None:
        """`pairs` of image and audio stand in a sample; an audio clip ends after `seconds`."""
        super().__init__()
        check_split(split)
        for name, value in (("length", length), ("pairs", pairs), ("image_size", image_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if seconds <= 0:
            raise ValueError(f"seconds must be positive, got {seconds}")
        self.stamps = [
            stamp
            for stamp in find_stamps(root)
            if spoken_caption(stamp).is_file() and split_of(stamp.caption) == split
        ]
        if len({stamp.caption for stamp in self.stamps}) < 2:
            raise ValueError(f"root must hold two spoken captions of split {split!r}, got {root}")
        self.split, self.length, self.seed = split, length, seed
        self.pairs, self.image_size, self.most = pairs, image_size, int(seconds * RATE)

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        turns: list[Turn] = []
        for _ in range(self.pairs):
            shown = self.stamps[rng.integers(len(self.stamps))]
            others = [stamp for stamp in self.stamps if stamp.caption != shown.caption]
            right = bool(rng.integers(2))
            heard = shown if right else others[rng.integers(len(others))]
            image = to_tensor(on_white(shown.path, self.image_size, self.image_size))
            waveform = read_audio(spoken_caption(heard))[: self.most]
            turns.append(Turn((image, torch.clone(waveform), "is this it?")))
            turns.append(Turn(("yes" if right else "no",), answer=True))
        return Sample(tuple(turns), f"spoken stamps/{self.split}/{index}")


def spoken_caption(stamp: Stamp) -> Path:
    """Where the spoken English caption of a stamp would be."""
    return stamp.path.with_name(f"{stamp.path.stem}_desc.ogg")

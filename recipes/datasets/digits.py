"""Handwritten digits on a canvas, and which digit is in which cell: a task that needs no download.

The 1797 images (8 x 8) ship with scikit-learn. Each belongs to one split only, so a held-out
canvas shows handwriting that training never saw.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from mm_sparse.recipes.data import SPLITS, Sample, Samples, Split, Turn, WordTokenizer, check_split

SIDE = 8
WORDS = ["which", "digit", "is", "in", "row", "column", ",", "?"]


class DigitTokenizer(WordTokenizer):
    """Every word that a question or an answer about digits can hold."""

    def __init__(self) -> None:
        super().__init__([*WORDS, *"0123456789"])


@lru_cache
def digit_images(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 8, 8) in [0, 1] and labels (n,): 80 % train, 10 % validation, 10 % test."""
    from sklearn.datasets import load_digits

    check_split(split)
    bunch: Any = load_digits()
    images, labels = bunch["images"].astype(np.float32) / 16, bunch["target"]
    order = np.random.default_rng(0).permutation(len(labels))
    cuts = [int(len(order) * 0.8), int(len(order) * 0.9)]
    part = np.split(order, cuts)[SPLITS.index(split)]
    return images[part], labels[part]


class DigitCanvases(Samples):
    """Canvases of rows x columns digits; canvas `i` of a split and seed is always the same."""

    def __init__(
        self,
        split: Split = "train",
        length: int = 100_000,
        *,
        rows: int = 4,
        columns: int = 4,
        cell: int = 12,
        scale: int = 1,
        questions: int = 4,
        seed: int = 0,
    ) -> None:
        """`cell` pixels hold a digit of 8 at a random place; `scale` repeats every pixel;
        `questions` ask for different cells of the canvas, one turn each."""
        for name, value, low, high in (
            ("length", length, 0, None),
            ("rows", rows, 1, 99),
            ("columns", columns, 1, 99),
            ("cell", cell, SIDE, None),
            ("scale", scale, 1, None),
            ("questions", questions, 1, rows * columns),
        ):
            if value < low or (high is not None and value > high):
                wanted = f"at least {low}" if high is None else f"in [{low}, {high}]"
                raise ValueError(f"{name} must be {wanted}, got {value}")
        self.images, self.labels = digit_images(split)
        self.split, self.length, self.seed = split, length, seed
        self.rows, self.columns, self.cell = rows, columns, cell
        self.scale, self.questions = scale, questions

    def __len__(self) -> int:
        return self.length

    def canvas(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels (height, width), digits (rows, columns), and the cells that are asked for."""
        if not 0 <= index < self.length:
            raise IndexError(f"index must be in [0, {self.length}), got {index}")
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        chosen = rng.integers(len(self.labels), size=(self.rows, self.columns))
        corner = rng.integers(self.cell - SIDE + 1, size=(self.rows, self.columns, 2))
        pixels = np.zeros((self.rows * self.cell, self.columns * self.cell), np.float32)
        for r in range(self.rows):
            for c in range(self.columns):
                top, left = np.array([r, c]) * self.cell + corner[r, c]
                pixels[top : top + SIDE, left : left + SIDE] = self.images[chosen[r, c]]
        asked = rng.permutation(self.rows * self.columns)[: self.questions]
        return pixels, self.labels[chosen], asked

    def __getitem__(self, index: int) -> Sample:
        pixels, digits, cells = self.canvas(index)
        pixels = pixels.repeat(self.scale, 0).repeat(self.scale, 1)
        image = torch.from_numpy(pixels).expand(3, -1, -1).contiguous()
        turns: list[Turn] = []
        for cell in cells:
            r, c = divmod(int(cell), self.columns)
            question = f"which digit is in row {r + 1}, column {c + 1}?"
            side = self.cell * self.scale
            asked = (r * side, c * side, (r + 1) * side, (c + 1) * side)
            turns.append(Turn((question,) if turns else (image, question), asked=asked))
            turns.append(Turn((str(digits[r, c]),), answer=True))
        return Sample(tuple(turns), f"digits/{self.split}/{index}")

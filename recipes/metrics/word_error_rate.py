"""Word and character error rate, counted so that batches and processes add up."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor


def plain(text: str) -> str:
    """What is compared: lower case, no punctuation but apostrophes, single spaces."""
    return " ".join(re.sub(r"[^\w\s']|_", " ", text.lower()).split())


class ErrorCounts:
    """Substitutions, insertions and deletions of all answers so far, over the words that there are.

    A reference without words counts the words that were said as insertions.
    """

    def __init__(self) -> None:
        self._totals = [0, 0, 0, 0]

    def add(self, wanted: Sequence[str], said: Sequence[str]) -> None:
        """One text for every reference."""
        import jiwer

        if len(wanted) != len(said):
            raise ValueError(
                f"said must have a text for each of the {len(wanted)} wanted, got {len(said)}"
            )
        for reference, heard in zip(wanted, said, strict=True):
            if not reference:
                self._grow([len(heard.split()), 0, len(heard), 0])
                continue
            words = jiwer.process_words(reference, heard)
            letters = jiwer.process_characters(reference, heard)
            counts = []
            for one in (words, letters):
                counts.append(one.substitutions + one.insertions + one.deletions)
                counts.append(one.substitutions + one.deletions + one.hits)
            self._grow(counts)

    def _grow(self, more: list[int]) -> None:
        self._totals = [a + b for a, b in zip(self._totals, more, strict=True)]

    def totals(self) -> Tensor:
        """(4,): wrong words, words, wrong characters, characters."""
        return torch.tensor(self._totals, dtype=torch.float64)

    @property
    def wer(self) -> float:
        """Word error rate."""
        return self._totals[0] / self._totals[1]

    @property
    def cer(self) -> float:
        """Character error rate."""
        return self._totals[2] / self._totals[3]

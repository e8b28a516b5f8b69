"""Which split a text belongs to: a text is the same wherever and however often it is spoken."""

from typing import Literal
from zlib import crc32

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def check_split(split: str) -> None:
    """Refuses what is no split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")


def split_of(text: str) -> Split:
    """80, 10 and 10 % of all texts, whatever their case and spaces."""
    place = crc32(" ".join(text.lower().split()).encode()) % 10
    return SPLITS[max(place - 7, 0)]

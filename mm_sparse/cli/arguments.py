"""Types of command line arguments: errors that say what is wanted."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """A number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text!r}")
    return value


def seconds(text: str) -> float:
    """A number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number from 0, got {text!r}")
    return value


def head_counts(text: str) -> tuple[int, int]:
    """Query heads and KV heads, "32/8"."""
    query, _, kv = text.partition("/")
    counts = [int(x) if x.isdecimal() else 0 for x in (query, kv)]
    if min(counts) < 1 or counts[0] % counts[1]:
        raise argparse.ArgumentTypeError(
            f'must be query heads and KV heads that divide them, as in "32/8", got {text!r}'
        )
    return counts[0], counts[1]


def png_path(text: str) -> Path:
    """Where a plot goes."""
    if find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError(
            'needs matplotlib, which is not installed; pip install "mm-sparse[train]" brings it'
        )
    return Path(text)

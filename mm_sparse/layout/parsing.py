"""Reading what a caller says of a row: spans of modalities, and grids of images and videos."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from numbers import Integral
from typing import Any

from torch import Tensor

from mm_sparse.modality import Modality

Span = tuple[Any, ...]
Grid = tuple[int, ...]
"""Sides in tokens: (height, width) of an image, (frames, height, width) of a video."""
_KINDS = {m.name.lower(): m for m in Modality}
_SIDES = {Modality.IMAGE: "(height, width)", Modality.VIDEO: "(frames, height, width)"}
PAD = -1


def parse_row(
    row: Sequence[Span],
) -> tuple[list[int], list[int], list[int], dict[int, Grid]]:
    """Modality, segment number and document of every token of a row, and grids by segment.

    A frame of a video is a segment; the grid stands at the first.
    """
    modality: list[int] = []
    segment: list[int] = []
    document: list[int] = []
    grids: dict[int, Grid] = {}
    latest = number = 0
    for item in row:
        if not isinstance(item, (tuple, list)) or len(item) not in (2, 3):
            raise ValueError(f"spans must be (kind, size) or (kind, size, document), got {item!r}")
        kind, size = item[0], item[1]
        doc: Any = item[2] if len(item) == 3 else 0
        frames = 1
        if kind not in (*_KINDS, "pad"):
            raise ValueError(f"kind must be one of {[*_KINDS, 'pad']}, got {kind!r}")
        if isinstance(size, (tuple, list)):
            if not is_grid(size, _KINDS.get(kind)):
                raise ValueError(
                    "size must be (height, width) of an image or (frames, height, width) of a "
                    f"video, got {size!r} ({kind})"
                )
            grid = grids[number] = tuple(int(side) for side in size)
            size = prod(grid)
            frames = grid[0] if kind == "video" else 1
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"size must be a number of tokens, got {size!r} ({kind})")
        if kind == "pad":
            doc = PAD
        elif isinstance(doc, bool) or not isinstance(doc, int) or doc < latest:
            raise ValueError(f"document must be an int that never falls, got {doc!r} in {item!r}")
        else:
            latest = doc
        modality += [int(_KINDS.get(kind, 0))] * size
        segment += [number + token * frames // size for token in range(size)]
        document += [doc] * size
        number += frames
    return modality, segment, document, grids


def grid_starts(
    modality: Tensor, document: Tensor, grids: Sequence[Grid] | Tensor, kind: Modality
) -> list[tuple[int, int, Grid]]:
    """Row, first token and grid of every image or video of the batch.

    Frames of a video may lie apart, with text between them: each run of frames that touch is given
    a grid of its own.

    Raises:
        ValueError: grids are not those of the tokens of this `kind`, in order and without a break.
    """
    noun = kind.name.lower()
    sizes: list[Grid] = []
    for grid in grids.tolist() if isinstance(grids, Tensor) else grids:
        if not is_grid(grid, kind):
            raise ValueError(f"{noun}_grids must be {_SIDES[kind]} of at least 1, got {grid!r}")
        sizes.append(tuple(int(side) for side in grid))
    tokens = ((modality == int(kind)) & (document >= 0)).nonzero().tolist()
    if sum(prod(grid) for grid in sizes) != len(tokens):
        raise ValueError(
            f"{noun}_grids must cover the {len(tokens)} {noun} tokens, got {sizes} which cover "
            f"{sum(prod(grid) for grid in sizes)}"
        )
    whole = "frames" if kind == Modality.VIDEO else f"{noun}s"
    heads: list[tuple[int, int, Grid]] = []
    at = 0
    for grid in sizes:
        if tokens[at][0] != tokens[at + prod(grid) - 1][0]:
            raise ValueError(f"{noun}_grids must follow the rows, got {grid} across two rows")
        frames, sides = (grid[0], grid[1:]) if kind == Modality.VIDEO else (1, grid)
        count = prod(sides)
        starts: list[int] = []
        for frame in range(frames):
            (row, first), (_, last) = tokens[at], tokens[at + count - 1]
            if last - first != count - 1:
                raise ValueError(
                    f"{noun}_grids must be of {whole} without a break, got {grid} for the {noun} "
                    f"tokens from {first} to {last} of row {row}"
                )
            touches = frame and first == starts[-1] + count
            starts.append(first)
            at += count
            if kind != Modality.VIDEO:
                heads.append((row, first, sides))
            elif touches:
                (row, first, run) = heads[-1]
                heads[-1] = (row, first, (run[0] + 1, *sides))
            else:
                heads.append((row, first, (1, *sides)))
    return heads


def frame_starts(first: int, grid: Grid) -> range:
    """First token of every segment of an image or video that begins at `first`."""
    frames = grid[0] if len(grid) == 3 else 1
    return range(first, first + prod(grid), prod(grid) // frames)


def is_grid(size: Any, kind: Modality | None) -> bool:
    """Whether these are the sides of an image or video."""
    sides = list(size) if isinstance(size, (tuple, list)) else []
    wanted = {Modality.IMAGE: 2, Modality.VIDEO: 3}.get(kind) if kind is not None else None
    return len(sides) == wanted and all(isinstance(x, Integral) and int(x) >= 1 for x in sides)


def shape_of(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else repr(value)

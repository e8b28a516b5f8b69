"""Reading what a caller says of a row: spans of modalities, and the grids of its images."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

from mm_sparse.modality import Modality

Span = tuple[Any, ...]
_KINDS = {m.name.lower(): m for m in Modality}
PAD = -1


def parse_row(
    row: Sequence[Span],
) -> tuple[list[int], list[int], list[int], dict[int, tuple[int, int]]]:
    """Modality, segment number and document of every token of a row, and grids by segment."""
    modality: list[int] = []
    segment: list[int] = []
    document: list[int] = []
    grids: dict[int, tuple[int, int]] = {}
    latest = 0
    for number, item in enumerate(row):
        if not isinstance(item, (tuple, list)) or len(item) not in (2, 3):
            raise ValueError(f"spans must be (kind, size) or (kind, size, document), got {item!r}")
        kind, size = item[0], item[1]
        doc: Any = item[2] if len(item) == 3 else 0
        if kind not in (*_KINDS, "pad"):
            raise ValueError(f"kind must be one of {[*_KINDS, 'pad']}, got {kind!r}")
        if isinstance(size, (tuple, list)):
            if kind != "image" or not _is_grid(size):
                raise ValueError(f"size must be (height, width) of an image, got {size!r} ({kind})")
            grids[number] = (int(size[0]), int(size[1]))
            size = int(size[0]) * int(size[1])
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"size must be a number of tokens, got {size!r} ({kind})")
        if kind == "pad":
            doc = PAD
        elif isinstance(doc, bool) or not isinstance(doc, int) or doc < latest:
            raise ValueError(f"document must be an int that never falls, got {doc!r} in {item!r}")
        else:
            latest = doc
        modality += [int(_KINDS.get(kind, 0))] * size
        segment += [number] * size
        document += [doc] * size
    return modality, segment, document, grids


def image_starts(
    modality: Tensor, document: Tensor, image_grids: Sequence[tuple[int, int]] | Tensor
) -> list[tuple[int, int, tuple[int, int]]]:
    """Row, first token and grid of every image."""
    sizes = []
    for grid in image_grids.tolist() if isinstance(image_grids, Tensor) else image_grids:
        if not _is_grid(grid):
            raise ValueError(f"image_grids must be (height, width) of at least 1, got {grid!r}")
        sizes.append((int(grid[0]), int(grid[1])))
    image_tokens = ((modality == int(Modality.IMAGE)) & (document >= 0)).nonzero().tolist()
    if sum(h * w for h, w in sizes) != len(image_tokens):
        raise ValueError(
            f"image_grids must cover the {len(image_tokens)} image tokens, got {sizes} which cover "
            f"{sum(h * w for h, w in sizes)}"
        )
    heads, at = [], 0
    for h, w in sizes:
        (row, first), (last_row, last) = image_tokens[at], image_tokens[at + h * w - 1]
        if last_row != row:
            raise ValueError(f"image_grids must follow the rows, got {(h, w)} across two rows")
        if last - first != h * w - 1:
            raise ValueError(
                f"image_grids must be of images without a break, got {(h, w)} for the image "
                f"tokens from {first} to {last} of row {row}"
            )
        heads.append((row, first, (h, w)))
        at += h * w
    return heads


def _is_grid(size: Any) -> bool:
    sides = list(size) if isinstance(size, (tuple, list)) else []
    return len(sides) == 2 and all(isinstance(x, Integral) and int(x) >= 1 for x in sides)


def shape_of(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else repr(value)

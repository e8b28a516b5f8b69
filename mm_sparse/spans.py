"""Reading what a caller says of a row: spans of modalities, and the grids of its pictures."""

from __future__ import annotations

from collections.abc import Sequence
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
        if kind != "pad" and kind not in _KINDS:
            raise ValueError(f"kind must be one of {[*_KINDS, 'pad']}, got {kind!r}")
        if isinstance(size, (tuple, list)):
            if kind != "image" or len(size) != 2 or min(size) < 1:
                raise ValueError(f"size must be (height, width) of an image, got {size!r} ({kind})")
            grids[number] = (int(size[0]), int(size[1]))
            size = size[0] * size[1]
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


def image_heads(
    modality: Tensor, document: Tensor, image_grids: Sequence[tuple[int, int]]
) -> list[tuple[int, int, tuple[int, int]]]:
    """Row, first token and grid of every picture."""
    sizes = [(int(h), int(w)) for h, w in image_grids]
    found = ((modality == int(Modality.IMAGE)) & (document >= 0)).nonzero().tolist()
    if sum(h * w for h, w in sizes) != len(found):
        raise ValueError(
            f"image_grids must cover the {len(found)} image tokens, got {sizes} which cover "
            f"{sum(h * w for h, w in sizes)}"
        )
    heads, at = [], 0
    for h, w in sizes:
        if found[at][0] != found[at + h * w - 1][0]:
            raise ValueError(f"image_grids must follow the rows, got {(h, w)} across two rows")
        heads.append((*found[at], (h, w)))
        at += h * w
    return heads


def shape_of(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else repr(value)

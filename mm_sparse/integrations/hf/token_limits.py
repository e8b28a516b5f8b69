"""How many tokens a transformers model is made for, where its config or its weights say so."""

from __future__ import annotations

from typing import Any

from torch import nn

# What models call a table with a learned vector for each position.
TABLES = frozenset(
    ("wpe", "position_embedding", "position_embeddings", "embed_positions", "positions_embed")
)


def position_rows(owner: nn.Module) -> int | None:
    """Positions of which a model has learned vectors; None where it has no table of them."""
    rows = [
        module.num_embeddings
        for name, module in owner.named_modules()
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in TABLES
    ]
    return max(rows) if rows else None


def patches_of_config(config: Any, patch: tuple[int, int], tubelet: int | None) -> int | None:
    """Patches of an image, or of a video, of the size in a config; None where it names none."""
    size = getattr(config, "image_size", None)
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        return None
    frames = 1
    if tubelet is not None:
        count = getattr(config, "num_frames", None)
        if not isinstance(count, int):
            return None
        frames = max(count // tubelet, 1)
    return frames * (sides[0] // patch[0]) * (sides[1] // patch[1])

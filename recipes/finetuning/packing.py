"""Conversations of a padded batch behind each other in one row, each a document of its own.

B conversations, L tokens of the longest, N tokens of all
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FAMILIES = ("granite_speech", "qwen2_5_vl", "qwen2_audio", "smolvlm", "voxtral")
"""Model types whose packed row says what its conversations say alone: tests hold them to it."""
TOKENS = ("input_ids", "labels", "token_type_ids", "mm_token_type_ids")
"""Inputs with a number for each token."""
IMAGES = {"pixel_values": 5, "pixel_attention_mask": 4}
"""Inputs with a row of images for each conversation, and the dimensions that they then have."""


def check_packs(model: Any) -> None:
    """Refuse a model whose family is not known to keep packed conversations apart.

    Raises:
        ValueError: it is not.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"pack must be false for a {kind} model, whose conversations are batched with padding: "
            f"only {', '.join(FAMILIES)} are known to keep packed ones apart"
        )


def pack_rows(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch padded on the right as one row without padding, `(1, N)`.

    Position ids start anew in every conversation, and without an attention mask both transformers
    and mm_sparse keep apart what starts anew. Images and audio stay in their order.

    Args:
        model: of `FAMILIES`, not wrapped.
        batch: inputs and labels of `ChatCollator`.

    Example:
        >>> model(**pack_rows(model, batch), use_cache=False).loss
    """
    keep = batch["attention_mask"].bool()
    packed = {
        name: _joined(name, value, keep)
        for name, value in batch.items()
        if name != "attention_mask"
    }
    packed["position_ids"] = _positions(model, batch, keep)
    if "labels" in packed:
        # The last token of a conversation does not predict the first of the next.
        starts = torch.cat([keep.new_zeros(1, dtype=torch.long), keep.sum(1).cumsum(0)[:-1]])
        packed["labels"] = packed["labels"].index_fill(1, starts, -100)
    return packed


def _joined(name: str, value: Any, keep: Tensor) -> Any:
    if name in TOKENS:
        return value[keep][None]
    if name in IMAGES and value.ndim == IMAGES[name]:
        return value.flatten(0, 1)[None]
    return value


def _positions(model: Any, batch: dict[str, Any], keep: Tensor) -> Tensor:
    """(1, N), or (4, 1, N) for rotary positions of time, height and width: text first."""
    plain = torch.arange(keep.shape[1], device=keep.device).expand(keep.shape)[keep]
    inner: Any = getattr(model, "model", None)
    if not hasattr(inner, "get_rope_index"):
        return plain[None]
    names = (
        "input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw",
        "second_per_grid_ts", "attention_mask",
    )  # fmt: skip
    given = {name: batch[name] for name in names if batch.get(name) is not None}
    by_axis, _ = inner.get_rope_index(**given)
    return torch.cat([plain[None], by_axis[:, keep]])[:, None]

"""Where frames of videos begin among the tokens of a language model.

B batch, N tokens
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_sparse.modality import Modality

GRIDS = "video_grid_thw"


def merge_size(config: Any) -> int | None:
    """Patches along each side of a frame that become one token; None if no config tells."""
    own = getattr(config, "spatial_merge_size", None)
    if isinstance(own, int):
        return own
    parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
    return next((size for part in parts if part and (size := merge_size(part))), None)


def first_of_frames(modality: Tensor, grids: Any, merge: int | None) -> Tensor | None:
    """Which tokens are the first of a frame: (B, N) bool; None where the grids do not tell.

    Args:
        modality: (B, N) of `Modality`.
        grids: (videos, 3), frames and height and width in patches of every video, row by row.
        merge: patches along each side of a frame that become one token.
    """
    if modality.shape[1] == 1:
        # Generation hands the grids on to every step.
        return None
    if merge is None or not isinstance(grids, Tensor) or grids.dim() != 2 or grids.shape[1] != 3:
        return None
    is_video = (modality == int(Modality.VIDEO)).flatten()
    counts = [h * w // merge**2 for frames, h, w in grids.tolist() for _ in range(frames)]
    positions = is_video.nonzero().flatten()
    # Whoever cuts a prompt, or joins frames in a way of its own, has other tokens.
    if not counts or min(counts) < 1 or sum(counts) != len(positions):
        return None
    sizes = torch.tensor(counts, device=modality.device)
    first = torch.zeros_like(is_video)
    first[positions[sizes.cumsum(0) - sizes]] = True
    return first.view(modality.shape)

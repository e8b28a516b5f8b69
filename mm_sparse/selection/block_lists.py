"""Lists of units and masks of units, each from the other.

B batch, K KV heads, T tiles, U units, L list length
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm_sparse.kernels.sizes import index_dtype


def lists_to_mask(index: Tensor, count: Tensor, num_units: int) -> Tensor:
    """(B, K, T, U) bool: what lists (B, K, T, L) hold up to their count (B, K, T)."""
    slot = torch.arange(index.shape[-1], device=index.device)
    ids = torch.where(slot < count[..., None], index, num_units).long()
    kept = torch.zeros(*ids.shape[:3], num_units + 1, dtype=torch.bool, device=index.device)
    return kept.scatter_(-1, ids, True)[..., :num_units]


def mask_to_lists(kept: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Ascending ids of at most `width` units where `kept` (B, K, T, U) is True, and their count."""
    slot = torch.where(kept, kept.cumsum(-1) - 1, width)
    kind = index_dtype(kept.shape[-1])
    index = torch.full((*kept.shape[:3], width + 1), -1, dtype=kind, device=kept.device)
    ids = torch.arange(kept.shape[-1], dtype=kind, device=kept.device).expand_as(slot)
    index = index.scatter_(-1, slot, ids)[..., :width].contiguous()
    return index, kept.sum(-1, dtype=torch.int32)

"""Kept and visible query-key pairs of lists of units.

B batch, K KV heads, T tiles, t tiles of a block, S query tokens of a tile, U units, L list length
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mm_sparse.layout import Plan
from mm_sparse.modality import Modality

# Query tokens times units that are compared at once.
BLOCK = 1 << 22


def count_pairs(index: Tensor, count: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Kept and visible pairs of all KV heads by modality of query and key, float64.

    Both have a column for each modality, a row for each and one more, of tiles of padding, which
    may see keys all the same.

    Args:
        index: (B, K, T, L) unit ids, up to
        count: (B, K, T).
    """
    kinds, num_tiles, num_units = len(Modality), plan.tiles.shape[1], plan.units.shape[1]
    kept = torch.zeros(kinds + 1, kinds, dtype=torch.float64, device=index.device)
    seen = torch.zeros_like(kept)
    slot = torch.arange(index.shape[-1], device=index.device)
    of_kind = one_hot(plan.unit_modality.long().clamp(min=0), kinds).double()  # (B, U, kinds)
    step = max(BLOCK // max(len(index) * plan.tile_tokens * num_units, 1), 1)
    for first in range(0, num_tiles, step):
        part = slice(first, first + step)
        pairs = _visible(plan, part)  # (B, t, U)
        listed = slot < count[:, :, part, None]  # (B, K, t, L)
        ids = index[:, :, part].masked_fill(~listed, 0).long().transpose(1, 2).flatten(2)
        heads = torch.zeros_like(pairs)  # that keep a unit
        heads.scatter_add_(2, ids, listed.transpose(1, 2).flatten(2).double())
        kind = plan.tile_modality[:, part].long()
        kind = torch.where(kind >= 0, kind, kinds).flatten()
        kept.index_add_(0, kind, ((pairs * heads) @ of_kind).flatten(0, 1))
        seen.index_add_(0, kind, (pairs @ of_kind).flatten(0, 1) * index.shape[1])
    return kept, seen


def _visible(plan: Plan, part: slice) -> Tensor:
    """(B, t, U) float64: pairs of a tile and a unit that see each other."""
    start, size = plan.units[:, None, None].unbind(-1)
    offset = torch.arange(plan.tile_tokens, device=start.device)
    token = plan.tiles[:, part, :1] + offset  # (B, t, S)
    exists = offset < plan.tiles[:, part, 1:]
    picked = token.clamp(max=max(plan.num_queries - 1, 0)).long().flatten(1)
    span = plan.span.gather(1, picked[..., None].expand(-1, -1, 2)).unflatten(1, token.shape[1:])
    low, high = span.masked_fill(~exists[..., None], 0)[..., None, :].unbind(-1)
    return (high.minimum(start + size) - low.maximum(start)).clamp(min=0).sum(2).double()

"""Which keys of a layer stay, under a budget, by what they are worth.

B batch, K KV heads, M keys, C keys that stay
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm_sparse.integrations.sparse_cache.budget import CacheBudget
from mm_sparse.integrations.sparse_cache.key_relevance import ranks

# What goes first where not all can stay: keys that always do, those of a floor or a share, others,
# those beyond the share of their modality, and padding.
ALWAYS, OWED, FREE, BEYOND, PADDING = 4, 3, 2, 1, 0


def choose_keys(
    worth: Tensor, valid: Tensor, kinds: Tensor, totals: Tensor, count: int, budget: CacheBudget
) -> Tensor:
    """Places of the keys that stay, ascending: (B, K, C), as many in every head and row.

    Keys are in the order of their positions, padding first. The first `sinks` and the newest
    `window` keys stay, then what floors and shares of modalities owe, then what is worth most.
    A row with fewer keys than stay keeps all of them, and padding.

    Args:
        worth: (B, K, M).
        valid: (B, M) bool, False on padding.
        kinds: (B, K, M) int8, modalities.
        totals: (B, modalities) int64, keys of each that a row has had, released ones included.
        count: C, unless floors need more.
    """
    keys = worth.shape[-1]
    always = always_kept(valid, budget)[:, None].expand_as(worth)
    real = valid[:, None].expand_as(worth)
    # A place in the order of worth, the best first; those that always stay before all others.
    order = ranks(worth.masked_fill(~real, -torch.inf))
    order = torch.where(always, order - keys, order)
    tier = torch.where(always, ALWAYS, torch.where(real, FREE, PADDING))
    owed = torch.zeros_like(always)
    for kind in budget.floors:
        owed |= _best(order, real & (kinds == int(kind)), _owed(totals, kind, budget))
    if budget.floors:
        count = min(keys, max(count, int((always | owed).sum(-1).amax())))
    for kind, share in budget.shares.items():
        member = real & (kinds == int(kind))
        quota = torch.full_like(totals[:, 0], round(share * count))
        own = _best(order, member, quota)
        tier = torch.where(own & (tier == FREE), OWED, tier)
        tier = torch.where(member & ~own & (tier == FREE), BEYOND, tier)
    tier = torch.where(owed & (tier < ALWAYS), OWED, tier)
    rank = tier * (2 * keys) - order
    return rank.topk(count, -1).indices.sort(-1).values


def always_kept(valid: Tensor, budget: CacheBudget) -> Tensor:
    """(B, M) bool: the first and the newest keys of each row.

    Args:
        valid: (B, M) bool, False on padding, which comes first.
    """
    keys = valid.shape[-1]
    place = torch.arange(keys, device=valid.device)
    first = keys - valid.sum(-1, keepdim=True)
    return ((place >= keys - budget.window) | (place < first + budget.sinks)) & valid


def _owed(totals: Tensor, kind: int, budget: CacheBudget) -> Tensor:
    return (totals[:, int(kind)] * budget.floors[kind]).ceil().long()  # pyright: ignore


def _best(order: Tensor, member: Tensor, quota: Tensor) -> Tensor:
    """(B, K, M) bool: the first `quota`, (B,), of the members."""
    beyond = order.amax() + 1
    own = ranks(-torch.where(member, order, beyond))
    return member & (own < quota[:, None, None])

"""What each key of a cache is worth: the exact attention mass that the newest queries give it.

The last queries of a prompt point at what the answer needs (SnapKV, arXiv 2404.14469).

B batch, H query heads, K KV heads, G = H / K, W queries, M keys, D head dim, U units
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

# Elements of one block of scores; more are computed block by block.
BLOCK_ELEMENTS = 1 << 25
# How much a key's own mass counts beside the largest near it: it orders equal ones.
TIES = 1e-3


def key_mass(
    q: Tensor, k: Tensor, visible: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """Softmax mass of every key, the mean over queries and the query heads of a KV head.

    Args:
        q: (B, H, W, D).
        k: (B, K, M, D).
        visible: (B or 1, W, M) bool, which key a query sees; queries that see none do not count.
        scale: factor on q.k.
        softcap: of models that have one, the bound c in c * tanh(q.k / c).
    Returns:
        (B, K, M) float32, or float64 for such q.
    """
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    kind = torch.promote_types(q.dtype, torch.float32)
    hidden = ~visible[:, None]
    live = visible.any(-1).to(kind).expand(batch, -1)
    members = (live.sum(-1) * group).clamp(min=1)
    mass = torch.empty(batch, kv_heads, keys, dtype=kind, device=q.device)
    step = max(1, BLOCK_ELEMENTS // max(1, queries * keys))
    for row in range(batch):
        own = row if len(hidden) > 1 else 0
        for head in range(kv_heads):
            total, own_keys = mass[row, head].zero_(), k[row, head].to(kind)
            for first in range(head * group, (head + 1) * group, step):
                block = q[row, first : min(first + step, (head + 1) * group)].to(kind)
                scores = block @ own_keys.T * scale
                if softcap:
                    scores = (scores / softcap).tanh() * softcap
                scores = scores.masked_fill_(hidden[own], -math.inf).softmax(-1)
                # A row without a visible key is all NaN.
                total += (scores.nan_to_num_(0.0) * live[row, :, None]).sum((0, 1))
    return mass / members[:, None, None]


def worth_of_mass(mass: Tensor, width: int) -> Tensor:
    """(B, K, M), larger where a key matters more: minus the better one of two ranks.

    One is the rank by its own mass, the other by the largest mass among `width` neighbours: single
    keys are what a text goes on from, and a fact is found again only with the keys beside it.
    """
    if width == 1:
        return mass
    # Of neighbours of the same key, those with mass of their own come first.
    near = max_pool1d(mass, width, 1, width // 2) + TIES * mass
    return -torch.minimum(ranks(mass), ranks(near)).to(mass.dtype)


def ranks(worth: Tensor) -> Tensor:
    """(B, K, M) int64: 0 for the largest; of equal ones the first comes first."""
    order = worth.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(worth.shape[-1], device=worth.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)


def by_unit(mass: Tensor, position: Tensor, kinds: Tensor, unit: int) -> Tensor:
    """The mean over the unit that each key is in, (B, K, M): units are kept or released as a whole.

    Args:
        position: (B, K, M), true positions, ascending.
        kinds: (B, K, M), modalities; a unit ends where they change.
        unit: keys of a unit, from a position that it divides.
    """
    change = torch.ones_like(position, dtype=torch.bool)
    own = position.div(unit, rounding_mode="floor")
    change[..., 1:] = (own[..., 1:] != own[..., :-1]) | (kinds[..., 1:] != kinds[..., :-1])
    index = change.cumsum(-1) - 1
    total, count = torch.zeros_like(mass), torch.zeros_like(mass)
    total.scatter_add_(-1, index, mass)
    count.scatter_add_(-1, index, torch.ones_like(mass))
    return (total / count.clamp(min=1)).gather(-1, index)

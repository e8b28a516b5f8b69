"""What each key of a cache is worth: the exact attention mass that the newest queries give it.

The last queries of a prompt point at what the answer needs (SnapKV, arXiv 2404.14469).

B batch, H query heads, K KV heads, G = H / K, W queries, M keys, D head dim, U units
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

# Elements of one block of scores; more are computed block by block.
BLOCK_ELEMENTS = 1 << 25


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


def smoothed(mass: Tensor, width: int) -> Tensor:
    """Means over `width` neighbours, (B, K, M): what stands beside a key that matters does, too."""
    if width == 1:
        return mass
    return avg_pool1d(mass, width, 1, width // 2, count_include_pad=False)


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

"""Attention in plain PyTorch: what every kernel of this folder must equal, forward and gradients.

B batch, H query heads, K KV heads, G = H / K, N query tokens, M key tokens, D head dim,
T tiles, U units, L list length
"""

import math

import torch
from torch import Tensor


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor, scale: float | None = None
) -> Tensor:
    """Softmax attention under a mask, in the inputs' precision; a query that sees nothing gets 0.

    Args:
        q: (B, H, N, D).
        k, v: (B, K, M, D), H a multiple of K.
        mask: bool, broadcastable to (B, H, N, M); True is visible.
        scale: factor on the scores, 1 / sqrt(D) if None.
    Returns:
        (B, H, N, D) in the dtype of `v`.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where visible, got {mask.dtype}")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.sum(-1, True)
    weight = (scores - top.masked_fill(top == -math.inf, 0)).exp()
    total = weight.sum(-1, keepdim=True)
    return (weight / total.masked_fill(total == 0, 1)).to(v.dtype) @ v


def dense_mask(
    tiles: Tensor, units: Tensor, span: Tensor, index: Tensor, count: Tensor, keys: int
) -> Tensor:
    """The visible and kept query-key pairs as one mask.

    Args:
        tiles: (B, T, 2) int32, first query token and length of each tile.
        units: (B, U, 2) int32, first key token and length of each unit.
        span: (B, N, 2) int32, the half-open range of keys that each query may see.
        index: (B, K, T, L) int16 or int32, kept unit ids; entries from `count` on are not read.
        count: (B, K, T) int32.
        keys: M.
    Returns:
        (B, K, N, M) bool.
    """
    batch, heads, num_tiles, length = index.shape
    device, num_queries = index.device, span.shape[1]
    num_units = units.shape[1]
    slot = torch.arange(length, device=device)
    ids = torch.where(slot < count[..., None], index, num_units).long()
    kept = torch.zeros(
        batch, heads, num_tiles, num_units + 1, dtype=torch.bool, device=device
    ).scatter_(-1, ids, True)[..., :num_units]
    in_tile = _membership(tiles, num_queries)  # (B, T, N)
    in_unit = _membership(units, keys)  # (B, U, M)
    pairs = torch.einsum("btn,bhtu,bum->bhnm", in_tile.float(), kept.float(), in_unit.float()) > 0
    key = torch.arange(keys, device=device)
    seen = (key >= span[..., :1]) & (key < span[..., 1:])
    return pairs & seen[:, None]


def _membership(table: Tensor, length: int) -> Tensor:
    """(B, P, 2) ranges -> (B, P, length) bool."""
    token = torch.arange(length, device=table.device)
    start, size = table[..., :1], table[..., 1:]
    return (token >= start) & (token < start + size)


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tensor,
    units: Tensor,
    span: Tensor,
    index: Tensor,
    count: Tensor,
    scale: float,
) -> Tensor:
    """`attention_reference` under `dense_mask`; autograd gives the gradients to be equalled."""
    mask = dense_mask(tiles, units, span, index, count, k.shape[2])
    return attention_reference(
        q, k, v, mask=mask.repeat_interleave(q.shape[1] // k.shape[1], dim=1), scale=scale
    )

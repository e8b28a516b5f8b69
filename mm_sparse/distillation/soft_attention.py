"""Attention whose units count by weights, so that what an output lacks teaches the scorers.

B batch, H query heads, K KV heads, G = H / K, N query tokens, M key tokens, D head dim, T tiles,
t tokens of a tile, U units, u keys of a unit
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mm_sparse.distillation.topk_relaxation import soft_topk
from mm_sparse.layout import Plan
from mm_sparse.scorers import gather_pieces
from mm_sparse.selection import Scores, lists_to_mask, select

# Logits of a block of tiles; a block is computed again in the backward pass.
BLOCK_ELEMENTS = 1 << 26


def unit_weights(
    values: Tensor, plan: Plan, temperature: float, *, straight: bool = False
) -> Tensor:
    """(B, K, T, U): how often the keys of a unit count when units are chosen softly.

    Open units count by `soft_topk`, and by the weight of the sample as far as they are not kept.
    The colder, the closer to what `attend` gives for `select`.

    Args:
        straight: the choice itself in the forward pass, the soft one in the backward pass.
    """
    chosen = select(Scores(values.detach(), plan), plan.layout, plan.config)
    stands, num_units = torch.zeros_like(values), values.shape[-1]
    best = chosen.index, chosen.count
    if chosen.sample is not None:
        sample = chosen.sample
        best = sample.best_index, sample.best_count
        weight = sample.weight.exp()[..., None]
        stands = lists_to_mask(sample.index, sample.count, num_units) * weight
    hard = lists_to_mask(*best, num_units).float()
    soft = soft_topk(values, plan, temperature)
    kept = torch.where(plan.always[:, None], 1.0, soft)
    # A tile that has nothing to choose keeps what it keeps.
    choice = (plan.visible & ~plan.always).sum(-1) > 1
    kept = torch.where(choice[:, None, :, None], kept, hard) * plan.visible[:, None]
    if straight:
        kept = hard + kept - kept.detach()
    return kept + (1 - kept) * stands


def weighted_attention(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, plan: Plan, scale: float
) -> Tensor:
    """Softmax attention in which keys count as often as their unit's weight says.

    Eager, a block of tiles at a time; gradients reach q, k, v and the weights.

    Args:
        q: (B, H, N, D). k, v: (B, K, M, D).
        weights: (B, K, T, U), at least 0.
    Returns:
        (B, H, N, D); zeros for a query that sees nothing.
    """
    rows, _ = gather_pieces(q, plan.tiles, plan.tile_tokens, plan.regular_tiles)
    span, _ = gather_pieces(plan.span[:, None], plan.tiles, plan.tile_tokens, plan.regular_tiles)
    rows = rows.unflatten(1, (k.shape[1], -1))  # (B, K, G, T, t, D)
    unit = _unit_of(plan)
    # Keys of no unit, which are padding, take the weight of a unit that nobody has.
    weights = torch.nn.functional.pad(weights, (0, 1))
    per_tile = rows[:, :, :, :1].numel() // rows.shape[-1] * k.shape[2]
    step = max(1, BLOCK_ELEMENTS // max(per_tile, 1))
    blocks = []
    for at in range(0, rows.shape[3], step):
        part = slice(at, at + step)
        args = (rows[:, :, :, part], k, v, weights[:, :, part], span[:, 0, part], unit, scale)
        blocks.append(checkpoint(_block, *args, use_reentrant=False))
    out = torch.cat(blocks, 3).flatten(1, 2)  # (B, H, T, t, D)
    return _to_tokens(out, plan)


def _block(
    rows: Tensor, k: Tensor, v: Tensor, weights: Tensor, span: Tensor, unit: Tensor, scale: float
) -> Tensor:
    """(B, K, G, T, t, D) of as many tiles."""
    shape = rows.shape[2:5]
    logits = (rows.flatten(2, 4) @ k.transpose(-1, -2)).float().unflatten(2, shape) * scale
    position = torch.arange(k.shape[2], device=k.device)
    low, high = span[..., None].unbind(-2)  # (B, T, t, 1)
    hidden = (position < low) | (position >= high)
    if bool(hidden.any()):
        logits = logits.masked_fill(hidden[:, None, None], -math.inf)
    top = logits.detach().amax(-1, keepdim=True).clamp(min=-1e30)
    own = unit[:, None, None].expand(-1, *weights.shape[1:3], -1)
    share = (logits - top).exp() * weights.gather(-1, own)[:, :, None, :, None]
    total = share.sum(-1, keepdim=True).clamp(min=1e-30)
    out = (share / total).to(v.dtype).flatten(2, 4) @ v
    return out.unflatten(2, shape)


def _unit_of(plan: Plan) -> Tensor:
    """(B, M) unit of each key, the number of units for none."""
    count = plan.units.shape[1]
    length = plan.layout.length
    offset = torch.arange(plan.unit, device=plan.units.device)
    token = torch.where(offset < plan.units[..., 1:], plan.units[..., :1] + offset, length)
    number = torch.arange(count, device=token.device)[:, None].expand_as(token)
    units = torch.full((len(token), length + 1), count, device=token.device)
    return units.scatter_(1, token.long().flatten(1), number.flatten(1))[:, :length]


def _to_tokens(rows: Tensor, plan: Plan) -> Tensor:
    """(B, H, T, t, D) of tiles -> (B, H, N, D)."""
    count = plan.num_queries
    offset = torch.arange(plan.tile_tokens, device=rows.device)
    token = torch.where(offset < plan.tiles[..., 1:], plan.tiles[..., :1] + offset, count)
    token = token.long().flatten(1)[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[-1])
    out = rows.new_zeros(*rows.shape[:2], count + 1, rows.shape[-1])
    return out.scatter(2, token, rows.flatten(2, 3))[:, :, :count]


@torch.no_grad()
def unit_error(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """What leaving out each unit changes in a tile's outputs, squared, on its own: (B, K, T, U).

    The sum over a unit's keys of share times distance of value and output, as a squared length;
    mean over the rows of a tile, over the mean of all tiles of a head, so that the units of a tile
    add up to 1 on average. Where a sample stands for the rest, its variance is a sum of these.
    """
    rows, exists = gather_pieces(q, plan.tiles, plan.tile_tokens, plan.regular_tiles)
    span, _ = gather_pieces(plan.span[:, None], plan.tiles, plan.tile_tokens, plan.regular_tiles)
    keys, present = gather_pieces(k, plan.units, plan.unit, plan.regular)
    values, _ = gather_pieces(v, plan.units, plan.unit, plan.regular)
    position = plan.units[..., :1] + torch.arange(plan.unit, device=q.device)  # (B, U, u)
    rows = rows.unflatten(1, (k.shape[1], -1))
    num_units = plan.units.shape[1]
    per_tile = rows[:, :, :, :1].numel() * num_units
    step = max(1, BLOCK_ELEMENTS // max(per_tile, 1))
    blocks = []
    for at in range(0, rows.shape[3], step):
        part = slice(at, at + step)
        own = rows[:, :, :, part]
        low, high = span[:, 0, part, :, :, None, None].unbind(3)  # (B, T, t, 1, 1)
        seen = (position[:, None, None] >= low) & (position[:, None, None] < high)
        seen &= present[:, None, None]
        logits = own.flatten(2, 4) @ keys.flatten(2, 3).transpose(-1, -2)
        logits = (
            (logits.float() * scale).unflatten(2, own.shape[2:5]).unflatten(-1, (num_units, -1))
        )
        logits = logits.masked_fill(~seen[:, None, None], -math.inf)
        share = logits.flatten(-2).softmax(-1).nan_to_num(0.0).view(logits.shape)
        flat = share.flatten(2, 4)  # (B, K, R, U, u)
        sums = flat.transpose(2, 3) @ values.float()  # (B, K, U, R, D)
        out = sums.sum(2, keepdim=True)
        lost = sums - flat.sum(-1).transpose(2, 3)[..., None] * out
        lost = lost.square().sum(-1).transpose(2, 3).unflatten(2, own.shape[2:5])
        live = exists[:, part].float()[:, None, None, ..., None]  # (B, 1, 1, T, t, 1)
        count = (live.sum(4) * plan.group).clamp(min=1)[:, :, 0]
        blocks.append((lost * live).sum((2, 4)) / count)
    error = torch.cat(blocks, 2)
    return error / error.sum(-1, keepdim=True).mean(2, keepdim=True).clamp(min=1e-20)

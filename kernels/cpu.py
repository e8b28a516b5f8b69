"""The same attention in plain PyTorch, on any device: gather the kept keys, then dense products.

B batch, H query heads, K KV heads, G = H / K, N query tokens, M key tokens, D head dim,
T tiles, L list length, C tiles of a chunk, R rows of a tile (tokens x G), S kept key slots
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_sparse.kernels.block_lists import BlockLists
from mm_sparse.kernels.sizes import new_output

# Gathered keys of a chunk stay within a core's share of the last-level cache (float32 elements).
CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class _Chunk:
    """Some consecutive tiles of one batch row and KV head."""

    query: Tensor  # (C, tokens) query token of each row, clamped
    exists: Tensor  # (C, tokens)
    key: Tensor  # (C, S) key token of each slot
    missing: Tensor | None  # (C, S) slots without a key, if a list of the chunk is empty
    hidden: Tensor  # (C, tokens, 1, S - cut), True where a query must not see a slot
    cut: int  # slots before it are seen by all


def _chunks(lists: BlockLists, width: int) -> Iterator[tuple[int, int, _Chunk]]:
    tiles, units, span, index, count, tile_tokens, unit, *_ = lists
    device = tiles.device
    within = torch.arange(unit, device=device)
    token = torch.arange(min(tile_tokens, max(span.shape[1], 1)), device=device)
    counts = count.tolist()
    for b in range(index.shape[0]):
        for h in range(index.shape[1]):
            first = 0
            while first < index.shape[2]:
                longest, last = max(counts[b][h][first], 1), first + 1
                while last < index.shape[2]:
                    grown = max(longest, counts[b][h][last])
                    if grown * unit * width * (last + 1 - first) > CHUNK_ELEMENTS:
                        break
                    longest, last = grown, last + 1
                chosen = slice(first, last)
                empty = 0 in counts[b][h][chosen]
                first = last
                ids = index[b, h, chosen, :longest]
                listed = torch.arange(ids.shape[1], device=device) < count[b, h, chosen, None]
                # Slots behind a short list or unit repeat a key of the same list, so that not even
                # a NaN of a key that is not kept can pass.
                ids = torch.where(listed, ids, ids[:, :1]).clamp(min=0).long()
                start, size = units[b][ids][..., None].unbind(-2)  # (C, L, 1)
                key = (start + within.minimum((size - 1).clamp(min=0))).flatten(1)
                real = ((within < size) & listed[..., None]).flatten(1)
                query = tiles[b, chosen, :1] + token
                exists = token < tiles[b, chosen, 1:]
                query = query.clamp(max=span.shape[1] - 1).long()
                low, high = span[b, query].unbind(-1)
                # Slots before `cut` are seen by every query of the chunk: most are. One short unit,
                # such as a class token, must not have all that follow it masked.
                whole = real & (key >= low.amax(1, True)) & (key < high.amin(1, True))
                whole = whole.all(0) & exists.all()
                order = (~whole).int().argsort(stable=True)
                cut = int(whole.sum())
                key, real = key[:, order], real[:, order]
                rest = key[:, None, cut:]
                seen = (rest >= low[..., None]) & (rest < high[..., None])
                seen &= real[:, None, cut:] & exists[..., None]
                missing = ~real if empty else None
                yield b, h, _Chunk(query, exists, key.long(), missing, ~seen[:, :, None], cut)


def _rows(x: Tensor, query: Tensor) -> Tensor:
    """(G, N, D) and (C, tokens) -> (C, tokens * G, D), in the precision of the arithmetic."""
    c, tokens = query.shape
    picked = x.transpose(0, 1)[query]  # (C, tokens, G, D)
    return picked.reshape(c, tokens * x.shape[0], -1).to(_compute_dtype(x))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _keys(x: Tensor, chunk: _Chunk) -> Tensor:
    """(M, D) -> (C, S, D)."""
    rows = x.index_select(0, chunk.key.flatten()).view(*chunk.key.shape, -1).to(_compute_dtype(x))
    return _cleared(rows, chunk)


def _cleared(rows: Tensor, chunk: _Chunk) -> Tensor:
    """Zero (C, S, D) where a slot has no key, for tiles that keep none at all."""
    if chunk.missing is not None:
        rows[chunk.missing] = 0
    return rows


def _scores(q: Tensor, k: Tensor, chunk: _Chunk, group: int) -> Tensor:
    scores = torch.bmm(q, k.transpose(1, 2))  # (C, R, S)
    c, r, s = scores.shape
    scores.view(c, r // group, group, s)[..., chunk.cut :].masked_fill_(chunk.hidden, -math.inf)
    return scores


def gathered_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `block_sparse_attention_fwd`; sums in float32 (float64 for float64 inputs)."""
    batch, heads, num_queries, dim = q.shape
    group = heads // k.shape[1]
    out = new_output(q)
    lse = q.new_empty(batch, heads, num_queries, dtype=torch.float32)
    walk = _chunks(lists, 2 * dim)
    for b, h, chunk in walk:
        own = slice(h * group, (h + 1) * group)
        q_rows = _rows(q[b, own], chunk.query) * scale
        scores = _scores(q_rows, _keys(k[b, h], chunk), chunk, group)
        top = scores.amax(-1, keepdim=True)
        top.masked_fill_(top == -math.inf, 0)
        weight = scores.sub_(top).exp_()
        total = weight.sum(-1, keepdim=True)
        result = torch.bmm(weight, _keys(v[b, h], chunk))
        result /= total.masked_fill(total == 0, 1)
        shape = (*chunk.query.shape, group)
        picked = chunk.query[chunk.exists]
        result = result.view(*shape, -1)[chunk.exists].transpose(0, 1)  # (G, rows, D)
        out[b, own, picked] = result.to(out.dtype)
        log = (top + total.log()).view(shape)[chunk.exists].transpose(0, 1)
        lse[b, own, picked] = log.float()
    return out, lse


def gathered_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: BlockLists,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `block_sparse_attention_bwd`; tiles add up in ascending order, so it repeats."""
    dim, group = q.shape[-1], q.shape[1] // k.shape[1]
    wide = _compute_dtype(q)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = torch.zeros(k.shape, dtype=wide, device=k.device)
    dv = torch.zeros(v.shape, dtype=wide, device=v.device)
    delta = (dout.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    norm = lse.masked_fill(lse == -math.inf, 0).to(wide)[..., None]
    walk = _chunks(lists, 4 * dim)
    for b, h, chunk in walk:
        own = slice(h * group, (h + 1) * group)
        q_rows, d_rows = _rows(q[b, own], chunk.query) * scale, _rows(dout[b, own], chunk.query)
        k_cols, v_cols = _keys(k[b, h], chunk), _keys(v[b, h], chunk)
        weight = _scores(q_rows, k_cols, chunk, group)
        weight = weight.sub_(_rows(norm[b, own], chunk.query)).exp_()
        slots = chunk.key.flatten()
        grad = _cleared(torch.bmm(weight.transpose(1, 2), d_rows), chunk)
        dv[b, h].index_add_(0, slots, grad.flatten(0, 1))
        dscore = torch.bmm(d_rows, v_cols.transpose(1, 2))
        dscore = dscore.sub_(_rows(delta[b, own], chunk.query)).mul_(weight)
        grad = _cleared(torch.bmm(dscore.transpose(1, 2), q_rows), chunk)
        dk[b, h].index_add_(0, slots, grad.flatten(0, 1))
        grad = torch.bmm(dscore, k_cols).mul_(scale)
        grad = grad.view(*chunk.query.shape, group, dim)[chunk.exists]
        dq[b, own, chunk.query[chunk.exists]] = grad.transpose(0, 1).to(dq.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype)

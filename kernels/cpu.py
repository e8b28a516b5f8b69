"""The same attention in plain PyTorch, on any device: gather the kept keys, then dense attention.

B batch, H query heads, K KV heads, G = H / K, N query tokens, M key tokens, D head dim,
T tiles, L list length, C tiles of a chunk, R rows of a tile (tokens x G), S key slots of a part

Slots that every query of a chunk sees, and those that some must not see, are two parts: the first
needs no mask. Two softmaxes are merged by their log sums (FlashDecoding; Dao et al., 2023). On a
CPU each part is one call of the operator behind `scaled_dot_product_attention`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mm_sparse.kernels.block_lists import BlockLists
from mm_sparse.kernels.sizes import new_output

# Gathered keys of a chunk stay within a core's share of the last-level cache (float32 elements).
CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class _Part:
    """Key slots of the tiles of a chunk."""

    key: Tensor  # (C, S) key token of each slot
    hidden: Tensor | None  # (C, tokens, S), True where a query must not see a slot; None: all see
    missing: Tensor | None  # (C, S) slots without a key, if a list of the chunk is empty


@dataclass(frozen=True)
class _Chunk:
    """Some consecutive tiles of one batch row and KV head."""

    query: Tensor  # (C, tokens) query token of each row, clamped
    exists: Tensor | None  # (C, tokens), None if all do
    run: slice | None  # the query tokens, if they follow each other
    parts: list[_Part]


def _chunks(lists: BlockLists, width: int) -> Iterator[tuple[int, int, _Chunk]]:
    tiles, units, span, index, count, tile_tokens, unit, *_ = lists
    device = tiles.device
    within = torch.arange(unit, device=device)
    token = torch.arange(min(tile_tokens, max(span.shape[1], 1)), device=device)
    counts, bounds = count.tolist(), tiles[..., :2].tolist()
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
                query = tiles[b, chosen, :1] + token
                exists = token < tiles[b, chosen, 1:2]
                query = query.clamp(max=span.shape[1] - 1).long()
                low, high = span[b, query].unbind(-1)
                low_most, high_most = low.amax(1, True), high.amin(1, True)

                ids = index[b, h, chosen, :longest]
                listed = torch.arange(ids.shape[1], device=device) < count[b, h, chosen, None]
                # Slots behind a short list or unit repeat a key of the same list, so that not even
                # a NaN of a key that is not kept can pass.
                ids = torch.where(listed, ids, ids[:, :1]).clamp(min=0).long()
                start, size = units[b][ids].unbind(-1)  # (C, L)
                whole = listed & (size == unit) & (start >= low_most)
                whole &= start + unit <= high_most
                # Units that all queries of a tile see whole come first; most are.
                order = whole.to(torch.int8).argsort(stable=True, dim=1, descending=True)
                start, size, listed = (x.gather(1, order) for x in (start, size, listed))
                cut = int(whole.sum(1).min())
                parts = []
                if cut:
                    key = (start[:, :cut, None] + within).flatten(1)
                    parts.append(_Part(key.long(), None, None))
                if cut < ids.shape[1]:
                    begin, length = start[:, cut:, None], size[:, cut:, None]
                    place = (begin + within.minimum((length - 1).clamp(min=0))).flatten(1)
                    real = ((within < length) & listed[:, cut:, None]).flatten(1)
                    hidden = (place[:, None] < low[..., None]) | (place[:, None] >= high[..., None])
                    hidden |= ~real[:, None]
                    parts.append(_Part(place.long(), hidden, ~real if empty else None))
                starts, sizes = zip(*bounds[b][chosen], strict=True)
                full = all(x == len(token) for x in sizes)
                follows = full and all(y - x == len(token) for x, y in pairwise(starts))
                run = slice(starts[0], starts[-1] + sizes[-1]) if follows else None
                first = last
                yield b, h, _Chunk(query, None if full else exists, run, parts)


def _rows(x: Tensor, chunk: _Chunk) -> Tensor:
    """(G, N, D) -> (C, tokens * G, D), in the precision of the arithmetic."""
    c, tokens = chunk.query.shape
    by_token = x.transpose(0, 1)
    picked = by_token[chunk.query if chunk.run is None else chunk.run]
    return picked.reshape(c, tokens * x.shape[0], -1).to(_compute_dtype(x))


def _put_rows(rows: Tensor, into: Tensor, chunk: _Chunk) -> None:
    """(C, tokens * G, ...) to where the chunk's queries are in (G, N, ...)."""
    rows = rows.view(*chunk.query.shape, into.shape[0], *rows.shape[2:])
    if chunk.run is not None:
        into[:, chunk.run] = rows.flatten(0, 1).transpose(0, 1).to(into.dtype)
        return
    query = chunk.query
    if chunk.exists is not None:
        rows, query = rows[chunk.exists], query[chunk.exists]
    else:
        rows, query = rows.flatten(0, 1), query.flatten()
    into[:, query] = rows.transpose(0, 1).to(into.dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _keys(x: Tensor, part: _Part) -> Tensor:
    """(M, D) -> (C, S, D)."""
    rows = x.index_select(0, part.key.flatten()).view(*part.key.shape, -1).to(_compute_dtype(x))
    return _cleared(rows, part)


def _cleared(rows: Tensor, part: _Part) -> Tensor:
    """Zero (C, S, D) where a slot has no key, for tiles that keep none at all."""
    if part.missing is not None:
        rows[part.missing] = 0
    return rows


def _row_mask(part: _Part, group: int) -> Tensor | None:
    """(C, R, S), True where a row must not see a slot."""
    if part.hidden is None:
        return None
    c, tokens, slots = part.hidden.shape
    return part.hidden[:, :, None].expand(c, tokens, group, slots).reshape(c, -1, slots)


def _is_fused(q: Tensor, v: Tensor) -> bool:
    """Whether the operator of a CPU takes it."""
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def _addend(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """(C, 1, R, S), minus infinity where the mask is true."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=like.dtype).masked_fill_(mask, -math.inf)[:, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> list[Tensor]:
    """Output (C, R, D) and log sum (C, R) of a part, minus infinity where no slot is seen."""
    if _is_fused(q, v):
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        four = (x[:, None] for x in (q, k, v))
        out, log = operator(*four, attn_mask=_addend(mask, q), scale=scale)
        out, log = out[:, 0], log[:, 0].to(q.dtype)
    else:
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
        if mask is not None:
            scores.masked_fill_(mask, -math.inf)
        top = scores.amax(-1, keepdim=True)
        top.masked_fill_(top == -math.inf, 0)
        weight = scores.sub_(top).exp_()
        total = weight.sum(-1, keepdim=True)
        out = torch.bmm(weight, v) / total.masked_fill(total == 0, 1)
        log = (top + total.log())[..., 0]
    if mask is not None:
        log = log.masked_fill(mask.all(-1), -math.inf)
    return [out, log]


def _merged(one: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    """Output and log sum over the slots of both."""
    log = torch.logaddexp(one[1], other[1])
    norm = log.masked_fill(log == -math.inf, 0)
    out = one[0] * (one[1] - norm).exp()[..., None]
    return [out.addcmul_(other[0], (other[1] - norm).exp()[..., None]), log]


def gathered_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `block_sparse_attention_fwd`; sums in float32 (float64 for float64 inputs)."""
    batch, heads, num_queries, dim = q.shape
    group = heads // k.shape[1]
    out = new_output(q)
    lse = q.new_empty(batch, heads, num_queries, dtype=torch.float32)
    for b, h, chunk in _chunks(lists, 2 * dim):
        own = slice(h * group, (h + 1) * group)
        rows = _rows(q[b, own], chunk)
        found: list[Tensor] = []
        for part in chunk.parts:
            mask = _row_mask(part, group)
            here = _attend(rows, _keys(k[b, h], part), _keys(v[b, h], part), mask, scale)
            found = _merged(found, here) if found else here
        _put_rows(found[0], out[b, own], chunk)
        _put_rows(found[1], lse[b, own], chunk)
    return out, lse


def _differentiate(
    given: list[Tensor], k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries (C, R, D), keys and values (C, S, D) of a part.

    Args:
        given: gradient of the output, queries, the output and the log sum over all parts.
    """
    dout, q, out, log = given
    if _is_fused(q, v):
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        four = (x[:, None] for x in (dout, q, k, v, out, log))
        addend = _addend(mask, q)
        grads = operator(*four, 0.0, False, attn_mask=addend, scale=scale)
        return grads[0][:, 0], grads[1][:, 0], grads[2][:, 0]
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    if mask is not None:
        scores.masked_fill_(mask, -math.inf)
    weight = scores.sub_(log[..., None]).exp_()
    dv = torch.bmm(weight.transpose(1, 2), dout)
    delta = (dout * out).sum(-1, keepdim=True)
    dscore = torch.bmm(dout, v.transpose(1, 2)).sub_(delta).mul_(weight).mul_(scale)
    return torch.bmm(dscore, k), torch.bmm(dscore.transpose(1, 2), q), dv


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
    norm = lse.masked_fill(lse == -math.inf, 0).to(wide)[..., None]
    for b, h, chunk in _chunks(lists, 4 * dim):
        own = slice(h * group, (h + 1) * group)
        given = [_rows(x[b, own], chunk) for x in (dout, q, out, norm)]
        given[3] = given[3][..., 0]
        if chunk.exists is not None:
            # Rows that repeat a query give keys no gradient.
            given[0] *= chunk.exists.repeat_interleave(group, 1)[..., None]
        found = torch.zeros_like(given[1])
        for part in chunk.parts:
            keys, values = _keys(k[b, h], part), _keys(v[b, h], part)
            grads = _differentiate(given, keys, values, _row_mask(part, group), scale)
            found += grads[0]
            slots = part.key.flatten()
            for total, grad in ((dk, grads[1]), (dv, grads[2])):
                total[b, h].index_add_(0, slots, _cleared(grad, part).flatten(0, 1))
        _put_rows(found, dq[b, own], chunk)
    return dq, dk.to(k.dtype), dv.to(v.dtype)

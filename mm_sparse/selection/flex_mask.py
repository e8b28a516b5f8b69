"""A selection as FlexAttention's BlockMask.

B batch, K KV heads, N query tokens, M key tokens, T tiles, U units
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mm_sparse.layout import Plan
from mm_sparse.selection.block_lists import lists_to_mask


def block_mask(index: Tensor, count: Tensor, plan: Plan, block_size: int = 128) -> Any:
    """BlockMask of lists of units: blocks with any kept pair are listed, elements decide.

    Memory is that of tiles x units, never of queries x keys.
    """
    from torch.nn.attention.flex_attention import BlockMask

    num_queries, num_keys = plan.num_queries, plan.layout.length
    num_units = plan.units.shape[1]
    tile_of = _piece_of(plan.tiles, num_queries)
    unit_of = _piece_of(plan.units, num_keys)
    # Behind the units is what stands for tokens of none.
    kept = pad(lists_to_mask(index, count, num_units), (0, 1))
    low, high = (x.contiguous() for x in plan.span.unbind(-1))
    group = plan.group

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        listed = kept[b, h // group, tile_of[b, q], unit_of[b, kv]]
        return listed & (kv >= low[b, q]) & (kv < high[b, q])

    blocks = _coarse(
        kept[..., :num_units], plan.tiles, plan.units, num_queries, num_keys, block_size
    )
    blocks = blocks.repeat_interleave(group, 1)
    count = blocks.sum(-1, dtype=torch.int32)
    order = blocks.int().sort(dim=-1, descending=True, stable=True).indices.to(torch.int32)
    return BlockMask.from_kv_blocks(
        count,
        order,
        BLOCK_SIZE=block_size,
        mask_mod=visible,
        seq_lengths=(num_queries, num_keys),
    )


def _piece_of(table: Tensor, length: int) -> Tensor:
    """Piece of every token, (B, length); tokens of no piece get the number after the last."""
    batch, pieces = table.shape[:2]
    owner = torch.full((batch, length + 1), pieces, dtype=torch.int64, device=table.device)
    size = int(table[..., 1].max()) if table.numel() else 0
    offset = torch.arange(size, device=table.device)
    token = torch.where(offset < table[..., 1:], table[..., :1] + offset, length).long()
    piece = torch.arange(pieces, device=table.device)[None, :, None].expand_as(token)
    owner.scatter_(1, token.flatten(1), piece.flatten(1))
    return owner[:, :length]


def _coarse(
    kept: Tensor, tiles: Tensor, units: Tensor, num_queries: int, num_keys: int, block: int
) -> Tensor:
    """(B, K, query blocks, key blocks) bool: which blocks hold a kept tile-unit pair."""
    rows = _touch(tiles, -(-num_queries // block), block)  # (B, T, query blocks)
    columns = _touch(units, -(-num_keys // block), block)
    hits = torch.einsum("btq,bhtu,buk->bhqk", rows.float(), kept.float(), columns.float())
    return hits > 0


def _touch(table: Tensor, blocks: int, block: int) -> Tensor:
    edge = torch.arange(blocks, device=table.device) * block
    start, size = table[..., :1], table[..., 1:]
    return (start < edge + block) & (start + size > edge) & (size > 0)

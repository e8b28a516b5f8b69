"""Sequences of several lengths whose keys and values lie in pages of one memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mm_sparse.kernels.block_lists import BlockLists

LAYOUTS = ("heads-first", "tokens-first", "packed-heads-first", "packed-tokens-first", "stacked")


def empty_pools(
    layout: str, pages: int, heads: int, size: int, dim: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """Keys and values (pages, heads, size, dim), laid out as engines do, filled with NaN."""

    def new(*shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    if layout == "heads-first":
        return new(pages, heads, size, dim), new(pages, heads, size, dim)
    if layout == "tokens-first":
        k, v = (new(pages, size, heads, dim).transpose(1, 2) for _ in range(2))
        return k, v
    if layout == "packed-heads-first":
        k, v = new(pages, heads, size, 2 * dim).chunk(2, -1)
        return k, v
    if layout == "packed-tokens-first":
        k, v = new(pages, size, heads, 2 * dim).transpose(1, 2).chunk(2, -1)
        return k, v
    k, v = new(pages, 2, size, heads, dim).transpose(2, 3).unbind(1)
    return k, v


@dataclass
class PagedCase:
    """Some sequences, and lists of units for the last queries of each."""

    lengths: tuple[int, ...]
    queries: int
    group: int = 4
    kv_heads: int = 2
    dim: int = 32
    size: int = 16
    unit: int = 16
    tile: int = 64
    share: float = 0.5
    layout: str = "packed-tokens-first"

    def make(
        self, dtype: torch.dtype, device: str = "cpu", seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, BlockLists]:
        """q (B, H, N, D), k and v (A, K, S, D), table (B, P), lists."""
        generator = torch.Generator().manual_seed(seed)
        batch, longest = len(self.lengths), max(self.lengths)
        per_row = -(-longest // self.size)
        total = batch * per_row + 3
        k, v = empty_pools(self.layout, total, self.kv_heads, self.size, self.dim, dtype, device)
        order = torch.randperm(total, generator=generator)[: batch * per_row]
        table = order.view(batch, per_row).to(device, torch.int32)
        for row, length in enumerate(self.lengths):
            for pool in (k, v):
                tokens = torch.randn(length, self.kv_heads, self.dim, generator=generator)
                write_tokens(pool, table[row], tokens.to(device, dtype))
            # Behind a sequence there is nothing to look up.
            table[row, -(-length // self.size) :] = -1
        heads = self.kv_heads * self.group
        q = torch.randn(batch, heads, self.queries, self.dim, generator=generator)
        return q.to(device, dtype), k, v, table, self.lists(generator, device)

    def lists(self, generator: torch.Generator, device: str) -> BlockLists:
        """Random units of each tile, those of its own tokens and the first among them."""
        batch, longest = len(self.lengths), max(self.lengths)
        tokens = max(self.tile // self.group, 1)
        starts = torch.arange(0, self.queries, tokens)
        tiles = torch.stack([starts, (self.queries - starts).clamp(max=tokens)], -1)
        tiles = tiles.expand(batch, -1, -1)
        length = torch.tensor(self.lengths)
        unit_start = torch.arange(-(-longest // self.unit)) * self.unit
        size = (length[:, None] - unit_start).clamp(0, self.unit)
        units = torch.stack([unit_start.expand_as(size), size], -1)
        units[..., 0] = units[..., 0].minimum(length[:, None])
        first = (length - self.queries)[:, None] + torch.arange(self.queries)
        span = torch.stack([torch.zeros_like(first), first + 1], -1)
        end = (length - self.queries)[:, None] + tiles.sum(-1)  # (B, T) keys that a tile sees
        visible = unit_start < end[..., None]
        last = unit_start >= end[..., None] - tokens - self.unit
        wanted = torch.rand(*visible.shape, generator=generator) < self.share
        kept = visible & (wanted | last | (unit_start == 0))
        kept = kept[:, None].repeat(1, self.kv_heads, 1, 1)
        count = kept.sum(-1)
        slot = torch.where(kept, torch.arange(kept.shape[-1]), kept.shape[-1]).sort(-1).values
        slot = slot[..., : int(count.max())]
        index = slot.masked_fill(slot == kept.shape[-1], -1)
        parts = (tiles, units, span, index, count)
        made = [x.to(device, torch.int32).contiguous() for x in parts]
        made[3] = made[3].to(torch.int16)
        even = 0 if len(set(self.lengths)) == 1 else -1
        return BlockLists(*made, tokens, self.unit, even, 0)


def write_tokens(pool: Tensor, pages: Tensor, tokens: Tensor, first: int = 0) -> None:
    """Write tokens (N, K, D) to a sequence's places from `first` on."""
    size = pool.shape[2]
    place = torch.arange(first, first + len(tokens), device=pool.device)
    pool[pages[place // size].long(), :, place % size] = tokens

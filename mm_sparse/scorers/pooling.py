"""Descriptors of tiles and units: means and extremes over the tokens of a piece.

B batch, H heads, N tokens, D head dim, P pieces, S size of a piece or sub-pools
"""

import torch
from torch import Tensor


def gather_pieces(x: Tensor, table: Tensor, size: int, regular: bool) -> tuple[Tensor, Tensor]:
    """Tokens of each piece side by side.

    Args:
        x: (B, H, N, D).
        table: (B, P, 2), first token and length.
        regular: piece p is exactly the tokens [p * size, (p + 1) * size).
    Returns:
        (B, H, P, size, D), a view if regular, and (B, P, size) bool, which of them exist.
    """
    batch, heads, length, dim = x.shape
    pieces = table.shape[1]
    offset = torch.arange(size, device=x.device)
    exists = offset < table[..., 1:]
    if regular:
        return x.unflatten(2, (pieces, size)), exists
    token = (
        (table[..., :1] + offset).clamp(0, max(length - 1, 0)).long().flatten(1)
    )  # (B, P * size)
    index = token[:, None, :, None].expand(-1, heads, -1, dim)
    return x.gather(2, index).view(batch, heads, pieces, size, dim), exists


def masked_mean(x: Tensor, exists: Tensor, dim: int) -> Tensor:
    """Mean over `dim` of what exists; zero where nothing does. Non-finite values count as zero,
    so that one bad token cannot blur the ranking of every other."""
    weight = exists.to(x.dtype)
    x = torch.nan_to_num(x, 0.0, 0.0, 0.0).masked_fill(~exists, 0)
    return x.sum(dim) / weight.sum(dim).clamp(min=1)


def masked_extremes(x: Tensor, exists: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Largest and smallest over `dim` of what exists; zero where nothing does."""
    x = torch.nan_to_num(x, 0.0, 0.0, 0.0)
    big = torch.finfo(x.dtype).max
    top = x.masked_fill(~exists, -big).amax(dim)
    low = x.masked_fill(~exists, big).amin(dim)
    any_exists = exists.any(dim)
    return top.masked_fill(~any_exists, 0), low.masked_fill(~any_exists, 0)


def tile_subpools(
    q: Tensor, tiles: Tensor, tile_tokens: int, subpools: int, regular: bool
) -> tuple[Tensor, Tensor]:
    """Means of `subpools` runs of tokens of every tile.

    Returns:
        (B, H, T, S, D), and (B, T, S) bool, False where a short tile has no token left.
    """
    rows, exists = gather_pieces(q, tiles, tile_tokens, regular)
    subpools = min(subpools, tile_tokens)
    width = -(-tile_tokens // subpools)
    missing = subpools * width - tile_tokens
    if missing:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
        exists = torch.nn.functional.pad(exists, (0, missing))
    rows = rows.unflatten(3, (subpools, width))  # (B, H, T, S, width, D)
    exists = exists.unflatten(2, (subpools, width))
    return masked_mean(rows, exists[:, None, ..., None], 4), exists.any(-1)

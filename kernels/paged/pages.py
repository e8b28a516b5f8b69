"""Keys and values in pages, as engines that serve many sequences keep them.

B batch, K KV heads, D head dim, P pages of a sequence, A all pages in memory, S tokens of a page,
U units
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Pages(NamedTuple):
    """Where the units of each sequence stand in memory that all sequences share."""

    table: Tensor
    """(B, P) int32: the page that holds each run of `units` units; entries behind a sequence's end
    are not read."""
    units: int
    """Units of a page."""
    stride: int
    """Units of memory from one page to the next, `units` where nothing lies between."""


def page_layout(pool: Tensor, unit: int) -> tuple[int, int]:
    """Units of a page, and units of memory between two pages, of keys (A, K, S, D).

    Args:
        pool: any strides; engines lay out heads before tokens or tokens before heads, keys beside
            values or apart.
    Raises:
        ValueError: pages do not hold whole units, or do not lie whole units apart.
    """
    if pool.dim() != 4:
        raise ValueError(f"pool must be (pages, KV heads, tokens, D), got {tuple(pool.shape)}")
    size, (apart, _, step, _) = pool.shape[2], pool.stride()
    if size % unit:
        raise ValueError(f"a page must hold whole units of {unit} tokens, got {size} tokens")
    if not step or apart % (step * unit):
        raise ValueError(
            f"pages must lie whole units of {unit} tokens apart, got strides {pool.stride()}"
        )
    return size // unit, apart // (step * unit)


def flat_tokens(pool: Tensor) -> Tensor:
    """Keys (A, K, S, D) as one row of tokens (1, K, M, D), a view: all that one stride reaches.

    Unit u of page p begins at token (p * stride + u) * unit, with `stride` of `page_layout`.
    Between two pages other tokens may lie, of values or other heads, which nobody lists.
    """
    pages, heads, size, dim = pool.shape
    apart, head, step, _ = pool.stride()
    tokens = (pages - 1) * (apart // step) + size if pages else 0
    # A stride that is never used, of a size that the copy engine takes.
    return pool.as_strided((1, heads, tokens, dim), (max(apart, step), head, step, 1))


def place_units(units: Tensor, pages: Pages) -> Tensor:
    """Where units stand in memory, counted in units from its start.

    Args:
        units: (B, ...) integers, numbers of units in their sequences.
    Returns:
        (B, ...) int64.
    """
    units = units.long()
    page = pages.table.long().gather(1, (units // pages.units).flatten(1)).view_as(units)
    return page * pages.stride + units % pages.units


def gather_tokens(pool: Tensor, table: Tensor, tokens: int) -> Tensor:
    """(B, K, `tokens`, D): keys or values of sequences in their order, copied out of their pages.

    Args:
        pool: (A, K, S, D).
        table: (B, P) integers; entries that are no page's count as page 0.
    """
    size = pool.shape[2]
    needed = table[:, : -(-tokens // size)].long().clamp(0, max(len(pool) - 1, 0))
    found = pool[needed]  # (B, P, K, S, D)
    return found.transpose(1, 2).flatten(2, 3)[:, :, :tokens]


def page_arguments(pages: Pages | None) -> tuple[Tensor | None, int, dict[str, int]]:
    """Table, distance of its rows and constants, as kernels that read pages are given them."""
    if pages is None:
        return None, 0, {"PAGE_UNITS": 0, "PAGE_STRIDE": 0}
    sizes = {"PAGE_UNITS": pages.units, "PAGE_STRIDE": pages.stride}
    return pages.table, pages.table.stride(0), sizes


def strides_of_keys(x: Tensor, pages: Pages | None) -> tuple[int, int, int]:
    """Strides of rows, heads and tokens; rows in pages share one memory."""
    row, head, token = x.stride()[:3]
    return (row if pages is None else 0), head, token

"""Lists of key blocks and the geometry that they refer to: what every attention kernel is given.

B batch, K KV heads, N query tokens, T tiles, U units, L list length
"""

from typing import NamedTuple

from torch import Tensor


class BlockLists(NamedTuple):
    """The units that each tile of queries attends to."""

    tiles: Tensor
    """(B, T, 2) int32: first query token and length of each tile."""
    units: Tensor
    """(B, U, 2) int32: first key token and length of each unit."""
    span: Tensor
    """(B, N, 2) int32: half-open range of keys that each query sees."""
    index: Tensor
    """(B, K, T, L) int16 or int32: ids of units, ascending up to `count`."""
    count: Tensor
    """(B, K, T) int32."""
    tile_tokens: int
    """Most query tokens in a tile."""
    unit: int
    """Most key tokens in a unit."""
    unit_offset: int = -1
    """If not -1, unit u is what exists of the `unit` keys from u * unit - unit_offset on."""
    tile_offset: int = -1
    """The same of tiles and queries."""

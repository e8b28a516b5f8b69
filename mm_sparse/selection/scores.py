"""Scores of key blocks, as scorers hand them to selection.

B batch, K KV heads, T tiles, U units, C units that compete for a tile
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mm_sparse.layout import Plan


@dataclass(frozen=True, eq=False)
class Runs:
    """Candidates of a tile by runs: run r is the units [r * size, (r + 1) * size)."""

    index: Tensor
    """(B, K, T, R) int16 or int32, ascending; -1 from `count` on."""
    count: Tensor
    """(B, K, T) int32."""
    size: int

    def units(self, num_units: int) -> Tensor:
        """(B, K, T, C) int64 unit ids, ascending; `num_units` where there is none."""
        within = torch.arange(self.size, device=self.index.device)
        ids = (self.index.long()[..., None] * self.size + within).flatten(-2)
        listed = torch.arange(ids.shape[-1], device=ids.device) < self.count[..., None] * self.size
        return torch.where(listed & (ids < num_units), ids, num_units)

    def among(self, num_units: int) -> Tensor:
        """(B, K, T, U) bool: which units are candidates."""
        ids = self.units(num_units)
        listed = torch.zeros(*ids.shape[:3], num_units + 1, dtype=torch.bool, device=ids.device)
        return listed.scatter_(-1, ids, True)[..., :num_units]

    def spread(self, values: Tensor, num_units: int) -> Tensor:
        """Values (B, K, T, C) at the places of their units: (B, K, T, U)."""
        whole = values.new_zeros(*values.shape[:3], num_units + 1)
        return whole.scatter_(-1, self.units(num_units), values)[..., :num_units]


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores and the geometry that they are scores of."""

    values: Tensor
    """(B, K, T, U): log of the predicted share of attention, up to a learned bias; of the units of
    `runs` alone, (B, K, T, C), if there are any."""
    plan: Plan
    runs: Runs | None = None
    """Runs of units whose units were ranked; None where all were (`SparseConfig.coarse_factor`)."""

    @property
    def shape(self) -> torch.Size:
        """Shape of `values`."""
        return self.values.shape

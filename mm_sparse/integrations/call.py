"""One call of an attention layer, as those who watch or replace it are given it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mm_sparse.config import SparseConfig
from mm_sparse.layout import Plan, TokenLayout
from mm_sparse.selection import Scores, Selection


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What a layer was given and what it made of it, as `capture_attention` hands it out.

    Tokens of `q`, `k` and `v` stand as `layout` and `plan()` have them: an image in patch order if
    `layout.order` is set. `mm_sparse.layout.restore(call.q, call.layout, call.first)` is as the
    model has them.
    """

    name: str
    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    scores: Scores | None = None
    """None if the layer ran dense, or nobody asked for them; `scores.plan.layout` is the layout."""
    selection: Selection | None = None
    reason: str = ""
    """Why it ran dense, or empty."""
    seconds: float | None = None
    """Only while timing."""
    config: SparseConfig | None = None
    """The layer's own; None where the call has no layout."""
    layout: TokenLayout | None = None
    """Of the keys, also of a layer that runs dense because `backend` says so."""
    first: int = 0
    """Place of the first query among the keys."""
    sparse: bool = False
    """Whether the layer attended to a selection."""

    def plan(self) -> Plan:
        """Tiles and units of the call.

        Raises:
            ValueError: the call has no layout.
        """
        if self.layout is None or self.config is None:
            raise ValueError(f"{self.name} has no layout: {self.reason or 'it was not asked for'}")
        return self.layout.plan(
            self.config,
            num_query_heads=self.q.shape[1],
            num_kv_heads=self.k.shape[1],
            num_queries=self.q.shape[2],
            query_offset=self.first,
        )

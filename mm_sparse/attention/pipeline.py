"""Scoring, selection and attention, in chunks of queries where scores would not fit.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mm_sparse.attention.query_chunks import query_chunks
from mm_sparse.attention.selected import attend
from mm_sparse.config import SparseConfig
from mm_sparse.kernels.sizes import new_output
from mm_sparse.layout import CallLayout
from mm_sparse.scorers import DescriptorCache, Scorer
from mm_sparse.selection import Selection, select


def rank_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    placed: CallLayout,
    config: SparseConfig,
    scorer: Scorer,
    scale: float | None,
    descriptors: DescriptorCache | None = None,
    note: Callable[[Selection], None] | None = None,
) -> Tensor:
    """Score, select, attend, in blocks of queries where the scores of all would not fit.

    Args:
        q, k, v: (B, H, N, D) and (B, K, M, D) in the order of the layout.
        placed: layout and place of the first query.
        note: is told what was selected, block by block.
    Returns:
        (B, H, N, D).
    """
    layout, first = placed.layout, placed.first
    blocks = query_chunks(
        layout, config, num_query_heads=q.shape[1], num_kv_heads=k.shape[1],
        num_queries=q.shape[2], query_offset=first,
    )  # fmt: skip
    found, whole = [], None
    for block in blocks:
        rows, offset = q[:, :, block], first + block.start
        several = rows.shape[2] < q.shape[2]
        if several and descriptors is None:
            descriptors = DescriptorCache()  # of units, which are those of all blocks
        # A scorer that came before there were such caches need not know of them.
        options = {} if descriptors is None else {"descriptors": descriptors}
        # Selection passes no gradient.
        with torch.no_grad():
            scores = scorer(
                rows, k, layout=layout, config=config, query_offset=offset, scale=scale, **options
            )
            selection = select(scores, layout, config)
        del scores
        if note is not None:
            note(selection)
        out = attend(rows, k, v, selection, scale=scale)
        if several and not out.requires_grad:
            # Joining all at the end would hold the output twice.
            whole = new_output(q) if whole is None else whole
            whole[:, :, block] = out
        else:
            found.append(out)
        del out
        if several:
            selection.plan.memo.clear()
    if whole is not None:
        return whole
    return found[0] if len(found) == 1 else torch.cat(found, 2)

"""Scoring, selection and attention, in chunks of queries where scores would not fit.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from mm_sparse.attention.query_chunks import plan_of_chunk, queries_of_share, query_chunks
from mm_sparse.attention.selected import attend_selection
from mm_sparse.config import SparseConfig
from mm_sparse.kernels.sizes import new_output
from mm_sparse.layout import CallLayout, Plan
from mm_sparse.scorers import DescriptorCache, Scorer
from mm_sparse.selection import Scores, Selection, select, select_units


def score_select_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: CallLayout,
    config: SparseConfig,
    scorer: Scorer,
    scale: float,
    *,
    cache: DescriptorCache | None = None,
    note: Callable[[Scores, Selection], None] | None = None,
    whole: bool = False,
    share: tuple[int, int] | None = None,
) -> Tensor:
    """Attention on the units that a scorer ranks best, for inputs that were checked.

    Args:
        q, k, v: (B, H, N, D) and (B, K, M, D) in the order of the layout.
        call: layout and position of the first query.
        cache: descriptors of the keys of earlier calls.
        note: is given scores and selection of every chunk.
        whole: score all queries at once, however much memory that takes.
        share: number and count of shares of about equal work, of which to do this one: zeros for
            the queries of the others.
    Returns:
        (B, H, N, D).
    """
    layout, first = call.layout, call.first
    heads, kv_heads, num_queries = q.shape[1], k.shape[1], q.shape[2]
    sizes = {
        "num_query_heads": heads,
        "num_kv_heads": kv_heads,
        "num_queries": num_queries,
        "query_offset": first,
    }
    chunks = [] if whole else query_chunks(layout, config, **sizes)
    plan = layout.plan(config, **sizes)
    if share is not None:
        if whole and note is not None:
            _select(q, k, plan, scorer, scale, cache, note)
            note = None
        own = queries_of_share(plan, *share)
        chunks = [slice(max(c.start, own.start), min(c.stop, own.stop)) for c in chunks or [own]]
        chunks = [c for c in chunks if c.start < c.stop]
        cache = DescriptorCache() if cache is None else cache
        outs = [_attend_chunk(q, k, v, plan, c, scorer, scale, cache, note) for c in chunks]
        # Also without a query, what takes gradients back to other ranks must find the way.
        outs = outs or [q[:, :, :0] + 0 * (k[..., :0].sum() + v[..., :0].sum())]
        return pad(torch.cat(outs, 2), (0, 0, own.start, num_queries - own.stop))
    if len(chunks) < 2:
        selection = _select(q, k, plan, scorer, scale, cache, note)
        return attend_selection(q, k, v, selection, scale)
    # Units are those of all chunks: they are described once.
    cache = DescriptorCache() if cache is None else cache
    outs, out = [], None
    for chunk in chunks:
        part = _attend_chunk(q, k, v, plan, chunk, scorer, scale, cache, note)
        if part.requires_grad:
            outs.append(part)
            continue
        # Joining all at the end would hold the output twice.
        out = new_output(q) if out is None else out
        out[:, :, chunk] = part
    return torch.cat(outs, 2) if out is None else out


def _attend_chunk(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, chunk: slice, scorer: Scorer, scale: float,
    cache: DescriptorCache | None, note: Callable[[Scores, Selection], None] | None,
) -> Tensor:  # fmt: skip
    """(B, H, n, D) of the queries of a chunk of a plan."""
    rows = q[:, :, chunk]
    selection = _select(rows, k, plan_of_chunk(plan, chunk), scorer, scale, cache, note)
    return attend_selection(rows, k, v, selection, scale)


def _select(
    q: Tensor,
    k: Tensor,
    plan: Plan,
    scorer: Scorer,
    scale: float,
    cache: DescriptorCache | None,
    note: Callable[[Scores, Selection], None] | None,
) -> Selection:
    """Scores and selection of one chunk; selection passes no gradient."""
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _select(q, k, plan, scorer, scale, cache, note)
    hooked = scorer._forward_hooks or scorer._forward_pre_hooks
    if type(scorer).forward is Scorer.forward and not hooked:
        scores = scorer.score_plan(q, k, plan, scale, cache)
        selection = select_units(scores.values, plan, scores.runs)
    else:
        # A scorer that was written before there were such caches need not know of them.
        options = {} if cache is None else {"descriptors": cache}
        scores = scorer(
            q, k, layout=plan.layout, config=plan.config, query_offset=plan.query_offset,
            scale=scale, **options,
        )  # fmt: skip
        selection = select(scores, plan.layout, plan.config)
    if note is not None:
        note(scores, selection)
    return selection

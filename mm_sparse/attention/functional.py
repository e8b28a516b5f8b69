"""Exact attention on a selection, and the three steps in one call.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mm_sparse._checks import autocast_inputs, check_heads, check_qkv
from mm_sparse.attention.dense import dense_attention, dense_length
from mm_sparse.attention.query_chunks import query_blocks
from mm_sparse.config import SparseConfig
from mm_sparse.integrations.layout_cache import Placed
from mm_sparse.kernels import ops
from mm_sparse.kernels.cpu import new_output
from mm_sparse.kernels.ops import supports
from mm_sparse.kernels.reference import attention_reference
from mm_sparse.layout.patch_order import in_patch_order, restore
from mm_sparse.layout.token_layout import TokenLayout
from mm_sparse.scorers.descriptor_cache import DescriptorCache
from mm_sparse.scorers.descriptors import last_contiguous
from mm_sparse.scorers.pooled import PooledScorer, Scorer
from mm_sparse.selection.sampling import attend_sampled
from mm_sparse.selection.selection import Selection, select

__all__ = ["attend", "attention_reference", "sparse_attention"]


def attend(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, *, scale: float | None = None
) -> Tensor:
    """Softmax attention under `selection.to_dense_mask()`, without ever building it.

    Where the selection has a sample (`SparseConfig.sampled`), its keys count several times.
    Differentiable in q, k and v. Sums run in a fixed order, so results repeat bit for bit;
    gradients of k and v need not with `SparseConfig(deterministic=False)`.
    Under autocast the inputs are cast to its dtype.

    Args:
        q: (B, H, N, D), float16, bfloat16 or float32, on a CPU also float64.
        k, v: (B, K, M, D).
        scale: factor on q.k, 1 / sqrt(D) if None.
    Returns:
        (B, H, N, D); a query that sees no kept key gets zeros and passes no gradient.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; the message names which.
    """
    q, k, v = autocast_inputs(q, k, v)
    check_qkv(q, k, v)
    if not isinstance(selection, Selection):
        raise TypeError(f"selection must be a Selection, got {type(selection).__name__}")
    plan = selection.plan
    want = (plan.tiles.shape[0], selection.num_query_heads, plan.num_queries)
    if q.shape[:3] != want:
        raise ValueError(
            f"q must be (batch, heads, tokens, head dim) with {want} as the selection has, "
            f"got {tuple(q.shape)}"
        )
    if k.shape[2] != plan.layout.length or k.shape[1] != selection.index.shape[1]:
        raise ValueError(
            f"k must have {selection.index.shape[1]} heads and {plan.layout.length} tokens as the "
            f"selection has, got {tuple(k.shape)}"
        )
    if selection.index.device != q.device:
        raise ValueError(f"selection must be on {q.device} as q is, got {selection.index.device}")
    reason = supports(q, k, plan.unit, plan.config.backend)
    if reason is not None:
        raise ValueError(f"q cannot be served by the sparse kernels: {reason}")
    if q.numel() == 0 or k.numel() == 0:
        return (q * 0).sum(-1, keepdim=True).expand_as(q) + 0 * v.sum()
    q, k, v = (last_contiguous(x) for x in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if selection.sample is not None:
        return attend_sampled(q, k, v, selection.sample, plan, scale)
    out, _ = ops.attend(
        q,
        k,
        v,
        plan.tiles,
        plan.units,
        plan.span,
        selection.index,
        selection.count,
        scale,
        plan.tile_tokens,
        plan.unit,
        plan.lead,
        plan.tile_lead,
        plan.config.backend,
        plan.config.deterministic,
    )
    return out


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: TokenLayout,
    config: SparseConfig,
    scorer: Scorer | None = None,
    query_offset: int | None = None,
    scale: float | None = None,
    descriptors: DescriptorCache | None = None,
) -> Tensor:
    """Score, select, attend; dense below `config.dense_below` tokens or with backend "dense".

    Pictures with a grid are ranked in patch order (`SparseConfig.grid_order`): the scorer is given
    tokens and layout in that order. What comes in and goes out is in the order of `layout`.

    Args:
        q: (B, H, N, D), the last N tokens of the layout unless `query_offset` says otherwise.
        k, v: (B, K, M, D), one key per token of the layout.
        scorer: `PooledScorer()` if None.
        descriptors: of the keys that earlier calls for this layer and sequence had, for decoding.
    Returns:
        (B, H, N, D).
    """
    q, k, v = autocast_inputs(q, k, v)
    check_heads(q, k, v, layout)
    if not isinstance(config, SparseConfig):
        raise TypeError(f"config must be a SparseConfig, got {type(config).__name__}")
    if layout.length < dense_length(config, q.device) or config.backend == "dense":
        return dense_attention(
            q, k, v, layout=layout, config=config, query_offset=query_offset, scale=scale
        )
    scorer = PooledScorer() if scorer is None else scorer
    first = layout.first_query(q.shape[2], query_offset)
    placed, q, k, v = in_patch_order(Placed(layout, first), config, q, k, v)
    inner = placed.layout
    out = rank_and_attend(q, k, v, placed, config, scorer, scale, descriptors)
    return out if inner is layout else restore(out, inner, first)


def rank_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    placed: Placed,
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
    blocks = query_blocks(
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
            selection.plan.known.clear()
    if whole is not None:
        return whole
    return found[0] if len(found) == 1 else torch.cat(found, 2)

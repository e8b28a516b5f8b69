"""What a model's own mask lets each query see: a range of keys per query, never an N x M mask.

B batch, N query tokens, M key tokens
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm_sparse.layout import PAD, TokenLayout


def visible_from_mask(mask: Tensor, hidden: float | None = None) -> Tensor:
    """Where a mask lets a key be seen: a bool mask itself, and the zeros of an additive one.

    Args:
        hidden: numbers down from here hide a key as -inf does; a quarter of the least if None.
    """
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    least = torch.finfo(mask.dtype).min / 4 if hidden is None else hidden
    if mask.requires_grad or bool((~seen & (mask > least)).any()):
        raise ValueError("attention_mask must hold 0 and -inf only, got an additive bias")
    return seen


def spans_from_dense(mask: Tensor) -> tuple[Tensor, Tensor]:
    """As `MaskRecipe.spans`, from a (B, heads, N, M) mask that exists: bool, or 0 and -inf."""
    if mask.dim() != 4:
        raise ValueError(f"attention_mask must be (batch, 1, N, M), got {tuple(mask.shape)}")
    seen = visible_from_mask(mask)
    if seen.shape[1] > 1 and bool((seen != seen[:, :1]).any()):
        raise ValueError("attention_mask must be the same for all heads, it differs")
    seen = seen[:, 0]
    keys = seen.shape[2]
    valid = seen.any(1)  # (B, M)
    position = torch.arange(keys, device=mask.device)
    low = torch.where(seen, position, keys).amin(-1)
    high = torch.where(seen, position + 1, 0).amax(-1)
    low = low.minimum(high)
    before = torch.nn.functional.pad(valid.cumsum(1), (1, 0))
    if bool((before.gather(1, high) - before.gather(1, low) != seen.sum(-1)).any()):
        raise ValueError(
            "attention_mask lets a query see several ranges of keys, only one range per query "
            "(padding apart) is honoured"
        )
    return torch.stack([low, high], -1).to(torch.int32), valid


def layout_from_spans(span: Tensor, valid: Tensor, first: int, modality: Tensor) -> TokenLayout:
    """Layout of M keys of which N, from `first` on, are queries with the ranges `span`."""
    batch, keys = valid.shape
    queries = span.shape[1]
    whole = torch.zeros(batch, keys, 2, dtype=torch.int32, device=valid.device)
    whole[:, first : first + queries] = span
    document = torch.zeros(batch, keys, dtype=torch.int32, device=valid.device)
    if queries == keys:
        document = _documents(span, valid)
    document = document.masked_fill(~valid, PAD)
    return TokenLayout.from_modality(modality, document_ids=document, span=whole)


def _documents(span: Tensor, valid: Tensor) -> Tensor:
    """Number the stretches that no query looks out of or into: (B, M) int32."""
    keys = valid.shape[1]
    if not keys:
        return torch.zeros_like(valid, dtype=torch.int32)
    position = torch.arange(keys, device=valid.device)
    low = torch.where(valid, span[..., 0], keys).flip(1).cummin(1).values.flip(1)
    high = torch.where(valid, span[..., 1], 0).cummax(1).values
    starts = torch.ones_like(valid)
    starts[:, 1:] = (low[:, 1:] >= position[1:]) & (high[:, :-1] <= position[1:])
    return (starts.cumsum(1) - 1).to(torch.int32)


def spans_of_tensor(mask: Tensor, queries: int, keys: int) -> tuple[Tensor, Tensor, int]:
    """Ranges (B, N, 2), valid keys (B, M) and the first query's place, as a mask says."""
    span, valid = spans_from_dense(mask)
    if span.shape[1] not in (1, queries) or valid.shape[1] < keys:
        raise ValueError(
            f"attention_mask must be for {queries} x {keys} tokens, got {tuple(mask.shape)}"
        )
    span, valid = span.expand(-1, queries, -1).clamp(max=keys), valid[:, :keys]
    # A cache may have slots behind the last query, which nobody sees.
    first = max(int(span[..., 1].max()) - queries, 0) if queries < keys else 0
    return span, valid, first


def spans_without_mask(
    queries: int, keys: int, causal: bool, window: int | None
) -> tuple[Tensor, Tensor, int]:
    """As SDPA reads it: one query sees all; causal queries start with the first key."""
    own = torch.arange(queries)
    low, high = torch.zeros_like(own), torch.full_like(own, keys)
    first = keys - queries
    if causal and queries > 1:
        first, high = 0, own + 1
    if causal and window:
        low = (own + first - window + 1).clamp(min=0)
    valid = torch.arange(keys) < (int(high.max()) if queries else 0)
    return torch.stack([low, high], -1).to(torch.int32)[None], valid[None], first

"""Errors that say which argument is wrong, what came and what is wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_sparse.layout import TokenLayout


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the dtype of autocast where it is on, as torch's own attention does."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "meta"
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in tensors)


def check_heads(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> None:
    """Refuse q (B, H, N, D), k and v (B, K, M, D) that do not fit each other or the layout."""
    check_qkv(q, k, v)
    if not isinstance(layout, TokenLayout):
        raise TypeError(f"layout must be a TokenLayout, got {type(layout).__name__}")
    if layout.batch != q.shape[0]:
        raise ValueError(f"layout must have {q.shape[0]} rows as q has, got {layout.batch}")
    if layout.length != k.shape[2]:
        raise ValueError(f"layout must have {k.shape[2]} tokens as k has, got {layout.length}")
    if layout.device != q.device:
        raise ValueError(f"layout must be on {q.device} as q is, got {layout.device}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse q, k and v whose ranks, shapes, dtypes or devices do not fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(
                f"{name} must be (batch, heads, tokens, head dim), got {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
    dtype, device, (batch, _, _, width) = q.dtype, q.device, q.shape
    for name, x in (("k", k), ("v", v)):
        if x.dtype != dtype:
            raise TypeError(f"{name} must have q's dtype {dtype}, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name} must be on q's device {device}, got {x.device}")
        if x.shape[0] != batch or x.shape[3] != width:
            raise ValueError(
                f"{name} must have q's batch {batch} and head dim {width}, got {tuple(x.shape)}"
            )
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q must have a multiple of k's {k.shape[1]} heads, got {q.shape[1]} heads"
        )


def check_sizes(num_query_heads: int, num_kv_heads: int, **others: int) -> None:
    """Refuse sizes of a layer or a scorer that are no positive ints, or heads in no groups."""
    sizes = {"num_query_heads": num_query_heads, "num_kv_heads": num_kv_heads, **others}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")
    if num_query_heads % num_kv_heads:
        raise ValueError(
            f"num_query_heads must be a multiple of num_kv_heads ({num_kv_heads}), "
            f"got {num_query_heads}"
        )


def check_shape(q: Tensor, k: Tensor, num_query_heads: int, num_kv_heads: int, dim: int) -> None:
    """Refuse q and k of other heads than those that something was made for."""
    if (q.shape[1], k.shape[1], q.shape[-1]) != (num_query_heads, num_kv_heads, dim):
        raise ValueError(
            f"q and k must have {num_query_heads} and {num_kv_heads} heads of {dim}, "
            f"got {q.shape[1]} and {k.shape[1]} heads of {q.shape[-1]}"
        )

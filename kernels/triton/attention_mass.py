"""True share of attention that every tile gives to every unit: what scorers learn from.

B batch, H query heads, K KV heads, G = H / K, N query tokens, M key tokens, D head dim,
T tiles, U units
"""

# Triton launches are subscripts of a jit function, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_sparse.kernels.sizes import next_power_of_2
from mm_sparse.kernels.triton.primitives import (
    COUNTS,
    LOG2E,
    load_keys,
    load_rows,
    row_span,
    tile_rows,
)


@triton.jit
def _attention_mass_logits(
    q, Kb, Ub, first, num_units, low, high, scale2, stride_kn,
    UNIT: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(R, C) scores in base 2 on the keys of units `first`, `first + 1`, ...; -inf if not seen."""
    unit = first + tl.arange(0, COLS) // UNIT
    offset = tl.arange(0, COLS) % UNIT
    there = unit < num_units
    start = tl.load(Ub + unit.to(tl.int64) * 2, mask=there, other=0)
    exists = there & (offset < tl.load(Ub + unit.to(tl.int64) * 2 + 1, mask=there, other=0))
    key = start + offset
    k = load_keys(Kb, key, exists, stride_kn, False, D, BLOCK_D)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
    seen = exists[None, :] & (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
    return tl.where(seen, score, -float("inf"))


@triton.jit
def _in_view(Ub, first, num_units, lowest, highest, STEP: tl.constexpr):
    """Whether one of STEP units lies in a range of keys."""
    unit = first + tl.arange(0, STEP)
    start = tl.load(Ub + unit * 2, mask=unit < num_units, other=0)
    size = tl.load(Ub + unit * 2 + 1, mask=unit < num_units, other=0)
    seen = (size > 0) & (start < highest) & (start + size > lowest)
    return tl.max(seen.to(tl.int32), 0) > 0


@triton.jit(do_not_specialize=COUNTS)
def _attention_mass(
    Q, K, Out, Tiles, Units, Span, scale, num_queries, num_tiles, num_units, kv_heads,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    COLS: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    LARGEST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A part of a tile's rows: their log-sum-exp, then sum or maximum over rows, unit by unit."""
    t = (num_tiles - 1 - tl.program_id(0) // SPLITS).to(tl.int64)
    part = tl.program_id(0) % SPLITS
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    token, g, exists = tile_rows(
        Tiles, (batch * num_tiles + t, t), part * ROWS, GROUP, ROWS, TOKENS, False
    )
    low, high = row_span(Span, token, exists, num_queries, batch)
    q = load_rows(
        Q + batch * stride_qb + head * GROUP * stride_qh, token, g, exists, stride_qh, stride_qn,
        False, D, BLOCK_D,
    )  # fmt: skip
    Kb = K + batch * stride_kb + head * stride_kh
    Ub = Units + batch * num_units * 2
    scale2 = scale * LOG2E
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    STEP: tl.constexpr = COLS // UNIT
    lowest = tl.min(tl.where(exists & (low < high), low, 2147483647), 0)
    highest = tl.max(tl.where(exists, high, 0), 0)
    for first in range(0, num_units, STEP):
        if _in_view(Ub, first, num_units, lowest, highest, STEP):
            score = _attention_mass_logits(
                q, Kb, Ub, first, num_units, low, high, scale2, stride_kn, UNIT, COLS, D, BLOCK_D,
                PRECISION,
            )  # fmt: skip
            new_top = tl.maximum(top, tl.max(score, 1))
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
            total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(score - shift[:, None]), 1)
            top = new_top
    shift = tl.where(total > 0, top, 0.0)
    share = tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)
    out = Out + (((batch * kv_heads + head) * num_tiles + t) * SPLITS + part) * num_units
    for first in range(0, num_units, STEP):
        value = tl.zeros([STEP], tl.float32)
        if _in_view(Ub, first, num_units, lowest, highest, STEP):
            score = _attention_mass_logits(
                q, Kb, Ub, first, num_units, low, high, scale2, stride_kn, UNIT, COLS, D, BLOCK_D,
                PRECISION,
            )  # fmt: skip
            weight = tl.exp2(score - shift[:, None]) * share[:, None]
            weight = tl.sum(tl.reshape(weight, (ROWS, STEP, UNIT)), 2)
            value = tl.max(weight, 0) if LARGEST else tl.sum(weight, 0)
        unit = first + tl.arange(0, STEP)
        tl.store(out + unit, value, mask=unit < num_units)


def unit_mass(
    q: Tensor, k: Tensor, tiles: Tensor, units: Tensor, span: Tensor, scale: float,
    tile_tokens: int, unit: int, largest: bool,
) -> Tensor:  # fmt: skip
    """Sum (or largest) over the rows of a tile of their softmax mass on a unit.

    Args:
        q: (B, H, N, D), the last dimension contiguous.
        k: (B, K, M, D), likewise.
        tiles: (B, T, 2), units: (B, U, 2) int32, first token and length.
        span: (B, N, 2) int32, keys that a query sees.
    Returns:
        (B, K, T, U) float32.
    """
    batch, heads, num_queries, dim = q.shape
    kv_heads, num_tiles, num_units = k.shape[1], tiles.shape[1], units.shape[1]
    group = heads // kv_heads
    all_rows = max(next_power_of_2(min(tile_tokens, num_queries) * group), 16)
    # float32 runs out of registers; the interpreter does not, and is slow on small blocks.
    block = 16 if q.element_size() == 4 and q.is_cuda else 64
    rows = min(all_rows, block)
    splits = all_rows // rows
    out = q.new_empty(batch, kv_heads, num_tiles, splits, num_units, dtype=torch.float32)
    if out.numel():
        _attention_mass[(num_tiles * splits, batch * kv_heads)](
            q, k, out, tiles, units, span, scale, num_queries, num_tiles, num_units, kv_heads,
            *q.stride()[:3], *k.stride()[:3],
            GROUP=group, TOKENS=tile_tokens, ROWS=rows, SPLITS=splits, COLS=max(block, unit),
            UNIT=unit, D=dim, BLOCK_D=max(next_power_of_2(dim), 16), LARGEST=largest,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return out.amax(3) if largest else out.sum(3)

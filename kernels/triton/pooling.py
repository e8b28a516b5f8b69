"""Descriptors of pieces of tokens: means of their parts, and extremes.

B batch, H heads, N tokens, D head dim, P pieces
"""

# Triton launches are subscripts of a jit function, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from mm_sparse.kernels.cached_launch import launch
from mm_sparse.kernels.sizes import cdiv, next_power_of_2
from mm_sparse.kernels.triton.primitives import COUNTS

# Tokens of a part that are read at once: of more, threads would have to exchange their sums.
STEP_TOKENS = 16
AHEAD = tl.constexpr(2)


@triton.jit
def _finite(x):
    """Non-finite values count as zero: one bad token must not blur the ranking of the others."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _pool_parts(
    X, Table, Out, scale, block, row, pieces, parts, heads, stride_b, stride_h, stride_n,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr, D: tl.constexpr,
    BLOCK_W: tl.constexpr, STEPS: tl.constexpr, BLOCK_D: tl.constexpr, EXTREMES: tl.constexpr,
    REGULAR: tl.constexpr,
):  # fmt: skip
    """TOGETHER parts of WIDTH tokens: the mean of each and, if asked, largest and smallest.

    Tokens of a part come BLOCK_W at a time, two steps written out so that their loads overlap.
    """
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    index = block * TOGETHER + tl.arange(0, TOGETHER)
    there = index < pieces * parts
    piece, part = index // parts, index % parts
    if REGULAR:
        start = piece * SIZE
        size = tl.where(there, SIZE, 0)
    else:
        table = Table + (batch * pieces + piece) * 2
        start = tl.load(table, mask=there, other=0)
        size = tl.load(table + 1, mask=there, other=0)
    members = tl.minimum(tl.maximum(size - part * WIDTH, 0), WIDTH)
    dim = tl.arange(0, BLOCK_D)
    base = X + batch * stride_b + head * stride_h
    total = tl.zeros([TOGETHER, BLOCK_D], tl.float32)
    high = tl.full([TOGETHER, BLOCK_D], -float("inf"), tl.float32)
    low = tl.full([TOGETHER, BLOCK_D], float("inf"), tl.float32)
    for step in tl.range(0, STEPS, loop_unroll_factor=AHEAD):
        member = step * BLOCK_W + tl.arange(0, BLOCK_W)
        # Triton lays parts along threads and their tokens along registers: sums need no shuffle.
        exists = (member[None, :] < members[:, None])[:, :, None]  # (TOGETHER, W, 1)
        token = (start + part * WIDTH)[:, None] + member[None, :]
        pointer = base + token.to(tl.int64)[:, :, None] * stride_n + dim[None, None, :]
        if D == BLOCK_D:
            x = tl.load(pointer, mask=exists, other=0.0)
        else:
            x = tl.load(pointer, mask=exists & (dim < D)[None, None, :], other=0.0)
        x = _finite(x.to(tl.float32))
        total += tl.sum(x, 1)
        if EXTREMES:
            high = tl.maximum(high, tl.max(tl.where(exists, x, -float("inf")), 1))
            low = tl.minimum(low, tl.min(tl.where(exists, x, float("inf")), 1))
    ROW: tl.constexpr = 3 * D if EXTREMES else D
    place = ((batch * heads + head) * pieces * parts + index)[:, None] * ROW + dim[None, :]
    mask = there[:, None] & (dim < D)[None, :]
    mean = total * (scale / tl.maximum(members, 1))[:, None]
    tl.store(Out + place, mean.to(Out.dtype.element_ty), mask=mask)
    if EXTREMES:
        some = (members > 0)[:, None]
        high, low = tl.where(some, high, 0.0), tl.where(some, low, 0.0)
        tl.store(Out + place + D, high.to(Out.dtype.element_ty), mask=mask)
        tl.store(Out + place + 2 * D, low.to(Out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _pool_means(
    X, Table, Out, scale, pieces, parts, heads, stride_b, stride_h, stride_n,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr, D: tl.constexpr,
    BLOCK_W: tl.constexpr, STEPS: tl.constexpr, BLOCK_D: tl.constexpr, EXTREMES: tl.constexpr,
    REGULAR: tl.constexpr,
):  # fmt: skip
    _pool_parts(
        X, Table, Out, scale, tl.program_id(0), tl.program_id(1), pieces, parts, heads, stride_b,
        stride_h, stride_n, SIZE, WIDTH, TOGETHER, D, BLOCK_W, STEPS, BLOCK_D, EXTREMES, REGULAR,
    )  # fmt: skip


@triton.jit(do_not_specialize=(*COUNTS, "q_blocks", "k_blocks", "queries_end"))
def _pool_queries_and_keys(
    Q, Tiles, OutQ, K, Units, OutK, scale, queries_end, q_blocks, k_blocks, num_tiles, num_units,
    q_heads, k_heads, query_pools, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    TILE: tl.constexpr, WIDTH: tl.constexpr, Q_TOGETHER: tl.constexpr, Q_BLOCK: tl.constexpr,
    Q_STEPS: tl.constexpr, REGULAR_TILES: tl.constexpr, UNIT: tl.constexpr,
    K_TOGETHER: tl.constexpr, K_BLOCK: tl.constexpr, K_STEPS: tl.constexpr, REGULAR: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Means of query pools of tiles, and of units: the programs of two launches in one."""
    program = tl.program_id(0)
    if program < queries_end:
        _pool_parts(
            Q, Tiles, OutQ, scale, program % q_blocks, program // q_blocks, num_tiles, query_pools,
            q_heads, stride_qb, stride_qh, stride_qn, TILE, WIDTH, Q_TOGETHER, D, Q_BLOCK, Q_STEPS,
            BLOCK_D, False, REGULAR_TILES,
        )  # fmt: skip
    else:
        program -= queries_end
        _pool_parts(
            K, Units, OutK, 1.0, program % k_blocks, program // k_blocks, num_units, 1,
            k_heads, stride_kb, stride_kh, stride_kn, UNIT, UNIT, K_TOGETHER, D, K_BLOCK, K_STEPS,
            BLOCK_D, False, REGULAR,
        )  # fmt: skip


@lru_cache(maxsize=4096)
def pool_blocks(width: int, dim: int, itemsize: int) -> tuple[int, int, int, int]:
    """Parts of a program, tokens of a part in a step (about 32 KiB in all), steps, and warps."""
    width = next_power_of_2(width)
    block = min(width, STEP_TOKENS)
    part = block * next_power_of_2(dim) * itemsize
    together = max(32768 // part, 1)
    return together, block, width // block, 4 if part <= 32768 else 8


def pool(
    x: Tensor, table: Tensor, size: int, parts: int = 1, extremes: bool = False,
    regular: bool = False, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Mean of every part of every piece, and its extremes; zero where nothing exists.

    Args:
        x: (B, H, N, D), the last dimension contiguous.
        table: (B, P, 2) int32, first token and length.
        size: most tokens in a piece.
        parts: runs of ceil(size / parts) tokens that a piece is cut into.
        regular: piece p is exactly the tokens [p * size, (p + 1) * size).
        scale: factor on the means.
    Returns:
        (B, H, P, parts, D or 3 D) in x's dtype: the mean, and with `extremes` behind it the largest
        and the smallest.
    """
    batch, heads, _, dim = x.shape
    pieces, width = table.shape[1], -(-size // parts)
    out = x.new_empty(batch, heads, pieces, parts, 3 * dim if extremes else dim)
    if out.numel():
        together, block, steps, warps = pool_blocks(width, dim, x.element_size())
        launch(
            _pool_means, (cdiv(pieces * parts, together), batch * heads),
            x, table, out, scale, pieces, parts, heads, *x.stride()[:3],
            SIZE=size, WIDTH=width, TOGETHER=together, D=dim,
            BLOCK_W=block, STEPS=steps, BLOCK_D=next_power_of_2(dim),
            EXTREMES=extremes, REGULAR=regular, num_warps=warps,
        )  # fmt: skip
    return out


def pool_both(
    q: Tensor, k: Tensor, tiles: Tensor, units: Tensor, tile: int, unit: int, query_pools: int,
    scale: float, *, regular_tiles: bool = False, regular: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`pool` of query pools of tiles, times `scale`, and of units, in one launch.

    Args:
        q, k: (B, H, N, D) and (B, K, M, D) of one dtype, the last dimension contiguous.
        tiles, units: (B, T, 2) and (B, U, 2) int32, of at most `tile` and `unit` tokens.
    Returns:
        (B, H, T, S, D) and (B, K, U, D).
    """
    batch, q_heads, _, dim = q.shape
    k_heads, num_tiles, num_units = k.shape[1], tiles.shape[1], units.shape[1]
    width = -(-tile // query_pools)
    of_tiles = q.new_empty(batch, q_heads, num_tiles, query_pools, dim)
    of_units = k.new_empty(batch, k_heads, num_units, dim)
    q_together, q_block, q_steps, warps = pool_blocks(width, dim, q.element_size())
    k_together, k_block, k_steps, k_warps = pool_blocks(unit, dim, k.element_size())
    q_blocks, k_blocks = cdiv(num_tiles * query_pools, q_together), cdiv(num_units, k_together)
    queries_end = q_blocks * batch * q_heads
    launch(
        _pool_queries_and_keys, (queries_end + k_blocks * batch * k_heads,),
        q, tiles, of_tiles, k, units, of_units, scale, queries_end, q_blocks, k_blocks, num_tiles,
        num_units, q_heads, k_heads, query_pools, *q.stride()[:3], *k.stride()[:3],
        TILE=tile, WIDTH=width, Q_TOGETHER=q_together, Q_BLOCK=q_block, Q_STEPS=q_steps,
        REGULAR_TILES=regular_tiles, UNIT=unit, K_TOGETHER=k_together, K_BLOCK=k_block,
        K_STEPS=k_steps, REGULAR=regular, D=dim, BLOCK_D=next_power_of_2(dim),
        num_warps=max(warps, k_warps),
    )  # fmt: skip
    return of_tiles, of_units

"""Backward for Hopper in one kernel over tiles: dK and dV are added up where they lie.

Scores are recomputed once, not twice as in `backward`: five products where that needs seven. Each
tile's share of dK and dV is added to float32 sums in memory by the copy engine, in the order in
which tiles come to it, so gradients differ in their last bits from run to run.

Two warps copy the listed units of keys and of values; two warpgroups of 64 rows each compute
weights, their gradients and dQ, and a third dV and dK of all 128 rows, which one warp each adds up.

B batch, H query heads, K KV heads, G = H / K, N query tokens, M key tokens, D head dim,
T tiles, U units, L list length
"""

# Triton launches are subscripts of a jit function, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportOperatorIssue=false
from typing import Any

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mm_sparse.kernels.block_lists import BlockLists
from mm_sparse.kernels.cached_launch import launch
from mm_sparse.kernels.device import multiprocessors
from mm_sparse.kernels.hopper.pipeline import (
    BOXED,
    FLAT,
    LOG2E,
    boxes,
    clean,
    copy_blocks,
    listed_keys,
    make_queue,
    one_list,
    rows_of_boxes,
    rows_of_tile,
    sorted_lists,
    take,
)
from mm_sparse.kernels.triton.primitives import COUNTS

SUMS = gl.constexpr(gl.NVMMASharedLayout(128, 32, rank=2))
BOXED_SUMS = gl.constexpr(gl.NVMMASharedLayout(128, 32, rank=3))
# By head dim: keys of a block, blocks in flight.
BLOCKS = {64: (64, 5), 128: (64, 2)}


@gl._core.builtin
def add_to_global(described: Any, coordinates: Any, box: Any, _semantic: Any = None) -> None:
    """Add a box of shared memory to global memory, as `tma.async_copy_shared_to_global` copies one.

    Triton 3.6 compiles it, and has no name for it in Gluon.
    """
    at = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, described.handle, at, box.handle)


@gluon.jit
def _add(
    w: gl.constexpr, queue, Described, pieces, full, free, tables, sizes, UNIT: gl.constexpr,
    COLS: gl.constexpr, D: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Adds blocks of dV (w = 0), or of dK (1), to the sums of their units."""
    kv_heads, lead = sizes[6], sizes[7]
    PIECES: gl.constexpr = COLS // (UNIT if UNIT < COLS else COLS)
    # A row that is negative is an illegal instruction here: sums start with `lead` more.
    padding = gl.maximum(lead, 0)
    step, turn = 0, 0
    batch, head, t = take(queue, turn, 1)
    while t >= 0:
        list_, inner, _main, total, count = one_list(batch, head, t, tables, sizes, UNIT, COLS)
        group = batch * kv_heads + head
        for j in range(total):
            rows = rows_of_boxes(j, batch, list_, inner, count, tables, sizes, UNIT, COLS, EVEN)
            mbarrier.wait(full.index(w), step % 2)
            for p in gl.static_range(PIECES):
                for h in gl.static_range(D // 32):
                    box = pieces.index((w * (D // 32) + h) * PIECES + p)
                    add_to_global(Described, [group, rows[p] + padding, h * 32], box)
            tma.store_wait(0)
            mbarrier.arrive(free.index(w))
            step += 1
        turn += 1
        batch, head, t = take(queue, turn, 1)


@gluon.jit
def _consume_bwd(
    w: gl.constexpr, queue, Q, Dout, Out, Lse, Dq, buffers, barriers, tables, sizes, scale, strides,
    GROUP: gl.constexpr, TOKENS: gl.constexpr, UNIT: gl.constexpr, COLS: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr, EVEN_TILES: gl.constexpr,
):  # fmt: skip
    """64 rows of one tile after the other: weights and their gradients for `_collect`, and dQ."""
    q_smem, do_smem, p_smem, ds_smem, k_smem, v_smem, _sums = buffers
    k_ready, k_free, v_ready, v_free, made, used, _full, _free = barriers
    Tiles, _units, Span, _order, _inner, _count = tables
    num_queries, kv_heads = sizes[1], sizes[6]
    stride_qb, stride_qh, stride_qn, stride_db, stride_dh, stride_dn = strides[:6]
    stride_ob, stride_oh, stride_on = strides[6:]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    whole: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows_w: gl.constexpr = gl.SliceLayout(1, whole)
    dtype: gl.constexpr = q_smem.dtype
    q, do = q_smem.index(w), do_smem.index(w)
    dim = gl.arange(0, D, gl.SliceLayout(0, whole))[None, :]
    scale2 = scale * LOG2E
    step, turn = 0, 0
    batch, head, t = take(queue, turn, 4)
    while t >= 0:
        list_, inner, main, total, count = one_list(batch, head, t, tables, sizes, UNIT, COLS)
        wide = batch.to(gl.int64)
        row = w * 64 + gl.arange(0, 64, rows_w)
        token, g, exists = rows_of_tile(Tiles, wide, sizes, t, row, GROUP, TOKENS, EVEN_TILES)
        own = (head * GROUP + g).to(gl.int64)
        there = exists[:, None]
        base = wide * stride_qb + own * stride_qh + token * stride_qn
        rows_q = gl.load(Q + base[:, None] + dim, mask=there, other=0.0)
        base = wide * stride_db + own * stride_dh + token * stride_dn
        rows_do = gl.load(Dout + base[:, None] + dim, mask=there, other=0.0)
        base = wide * stride_ob + own * stride_oh + token * stride_on
        rows_o = gl.load(Out + base[:, None] + dim, mask=there, other=0.0)
        delta = gl.sum(rows_o.to(gl.float32) * rows_do.to(gl.float32), 1)
        delta = gl.convert_layout(delta, rows_s)[:, None]
        # `_collect` may still read the last tile's rows.
        mbarrier.wait(used, step % 2 ^ 1)
        q.store(rows_q)
        do.store(rows_do)
        fence_async_shared()
        gl.thread_barrier()
        row = w * 64 + gl.arange(0, 64, rows_s)
        token, g, exists = rows_of_tile(Tiles, wide, sizes, t, row, GROUP, TOKENS, EVEN_TILES)
        at = ((wide * kv_heads + head) * GROUP + g) * num_queries + token
        lse = gl.load(Lse + at, mask=exists, other=float("inf")) * LOG2E
        # A row that sees nothing weighs nothing.
        lse = gl.where(lse == -float("inf"), float("inf"), lse)[:, None]
        span = Span + (wide * num_queries + token) * 2
        acc = gl.zeros([64, D], gl.float32, o_layout)
        p = gl.zeros([64, COLS], gl.float32, s_layout)
        ds = gl.zeros([64, COLS], gl.float32, s_layout)
        if total > 0:
            stage = step % STAGES
            mbarrier.wait(k_ready.index(stage), step // STAGES % 2)
            mbarrier.wait(v_ready.index(stage), step // STAGES % 2)
            s = warpgroup_mma(
                q, k_smem.index(stage).permute((1, 0)), p, use_acc=False, is_async=True
            )
            ds = warpgroup_mma(
                do, v_smem.index(stage).permute((1, 0)), ds, use_acc=False, is_async=True
            )
            s = warpgroup_mma_wait(1, deps=(s,))
            p = gl.exp2(s * scale2 - lse)
            ds = warpgroup_mma_wait(0, deps=(ds,))
            gl.thread_barrier()
            mbarrier.arrive(v_free.index(stage))
        for j in range(total):
            stage = step % STAGES
            if j >= main:
                column = j * COLS + gl.arange(0, COLS, gl.SliceLayout(0, s_layout))
                key, listed = listed_keys(
                    column, tables, sizes, wide, list_, inner, count, UNIT, EVEN
                )
                low = gl.load(span, mask=exists, other=0)[:, None]
                width = (gl.load(span + 1, mask=exists, other=0)[:, None] - low).to(gl.uint32)
                seen = (gl.where(listed, key, -1)[None, :] - low).to(gl.uint32) < width
                p = gl.where(seen, p, 0.0)
                # What was multiplied may be the next unit's, and NaN there.
                ds = gl.where(seen, ds, 0.0)
                if not EVEN:
                    # So are keys behind a short unit: each warpgroup zeroes half of a block's.
                    clean(
                        k_smem.index(stage), j, w, whole, wide, list_, inner, count, tables,
                        sizes, UNIT, COLS,
                    )  # fmt: skip
            ds = p * (ds - delta)
            mbarrier.wait(used, step % 2 ^ 1)
            p_smem.index(w).store(p.to(dtype))
            narrow = ds.to(dtype)
            ds_smem.index(w).store(narrow)
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(made)
            if not EVEN:
                # The other warpgroup's half of the keys is zeroed, too.
                mbarrier.wait(made, step % 2, pred=j >= main)
            operand = gl.convert_layout(narrow, ds_layout)
            acc_next = warpgroup_mma(operand, k_smem.index(stage), acc, is_async=True)
            # Scores of the next step, of no use behind the last.
            after = (step + 1) % STAGES
            more = j + 1 < total
            mbarrier.wait(k_ready.index(after), (step + 1) // STAGES % 2, pred=more)
            mbarrier.wait(v_ready.index(after), (step + 1) // STAGES % 2, pred=more)
            s_next = warpgroup_mma(
                q, k_smem.index(after).permute((1, 0)), p, use_acc=False, is_async=True
            )
            ds_next = warpgroup_mma(
                do, v_smem.index(after).permute((1, 0)), ds, use_acc=False, is_async=True
            )
            acc, s, operand = warpgroup_mma_wait(1, deps=(acc_next, s_next, operand))
            gl.thread_barrier()
            mbarrier.arrive(k_free.index(stage))
            p = gl.exp2(s * scale2 - lse)
            ds = warpgroup_mma_wait(0, deps=(ds_next,))
            gl.thread_barrier()
            mbarrier.arrive(v_free.index(after), pred=more)
            step += 1
        # Through shared memory, where q was, so that rows are written whole.
        mbarrier.wait(used, step % 2 ^ 1)
        q.store((acc * scale).to(dtype))
        gl.thread_barrier()
        row = w * 64 + gl.arange(0, 64, rows_w)
        token, g, exists = rows_of_tile(Tiles, wide, sizes, t, row, GROUP, TOKENS, EVEN_TILES)
        at = ((wide * kv_heads + head) * GROUP + g) * num_queries + token
        gl.store(Dq + at[:, None] * D + dim, q.load(whole), mask=exists[:, None])
        turn += 1
        batch, head, t = take(queue, turn, 4)


@gluon.jit
def _collect(
    queue, buffers, barriers, tables, sizes, UNIT: gl.constexpr, COLS: gl.constexpr,
    D: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """dV and dK of a block of keys, of all 128 rows."""
    q_smem, do_smem, p_smem, ds_smem, _k, _v, sums = buffers
    _k_ready, _k_free, _v_ready, _v_free, made, used, full, free = barriers
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    step, turn = 0, 0
    batch, head, t = take(queue, turn, 4)
    while t >= 0:
        list_, inner, main, total, count = one_list(batch, head, t, tables, sizes, UNIT, COLS)
        for j in range(total):
            mbarrier.wait(made, step % 2)
            # dV, then dK: registers for both would be missing elsewhere.
            acc = gl.zeros([COLS, D], gl.float32, layout)
            for w in gl.static_range(2):
                for i in gl.static_range(2):
                    if w == 0:
                        acc = warpgroup_mma(
                            p_smem.index(i).permute((1, 0)), do_smem.index(i), acc, use_acc=i > 0,
                            is_async=True,
                        )  # fmt: skip
                    else:
                        acc = warpgroup_mma(
                            ds_smem.index(i).permute((1, 0)), q_smem.index(i), acc, use_acc=i > 0,
                            is_async=True,
                        )  # fmt: skip
                mbarrier.wait(free.index(w), step % 2 ^ 1)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                if w == 1:
                    gl.thread_barrier()
                    mbarrier.arrive(used)
                if not EVEN:  # noqa: SIM102 - a constant, and a branch
                    if j >= main:
                        # Weights behind a short unit are 0, but 0 x NaN is NaN.
                        column = j * COLS + gl.arange(0, COLS, gl.SliceLayout(1, layout))
                        _key, there = listed_keys(
                            column, tables, sizes, batch, list_, inner, count, UNIT, EVEN
                        )
                        acc = gl.where(there[:, None], acc, 0.0)
                sums.index(w).store(acc)
                fence_async_shared()
                gl.thread_barrier()
                mbarrier.arrive(full.index(w))
            step += 1
        turn += 1
        batch, head, t = take(queue, turn, 4)


@gluon.jit(do_not_specialize=COUNTS)
def _block_sparse_attention_bwd_hopper(
    Q, Kd, Vd, Out, Dout, Lse, Dq, Dkd, Dvd, Tiles, Units, Span, Order, Inner, Count, Begun, scale,
    items, num_queries, num_keys, num_tiles, num_units, list_length, kv_heads, lead, tile_lead,
    stride_qb, stride_qh, stride_qn, stride_db, stride_dh, stride_dn, stride_ob, stride_oh,
    stride_on, GROUP: gl.constexpr, TOKENS: gl.constexpr, EVEN: gl.constexpr,
    EVEN_TILES: gl.constexpr, UNIT: gl.constexpr, COLS: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = Q.dtype.element_ty
    tables = (Tiles, Units, Span, Order, Inner, Count)
    sizes = (
        items, num_queries, num_keys, num_tiles, num_units, list_length, kv_heads, lead, tile_lead
    )  # fmt: skip
    strides = (
        stride_qb, stride_qh, stride_qn, stride_db, stride_dh, stride_dn, stride_ob, stride_oh,
        stride_on,
    )  # fmt: skip
    PIECE: gl.constexpr = UNIT if UNIT < COLS else COLS
    BOXES: gl.constexpr = STAGES * (D // 64) * (COLS // PIECE)
    ADDED: gl.constexpr = (D // 32) * (COLS // PIECE)
    q_smem = gl.allocate_shared_memory(dtype, [2, 64, D], FLAT)
    do_smem = gl.allocate_shared_memory(dtype, [2, 64, D], FLAT)
    p_smem = gl.allocate_shared_memory(dtype, [2, 64, COLS], FLAT)
    ds_smem = gl.allocate_shared_memory(dtype, [2, 64, COLS], FLAT)
    k_pieces = gl.allocate_shared_memory(dtype, [BOXES, 1, 1, PIECE, 64], BOXED)
    v_pieces = gl.allocate_shared_memory(dtype, [BOXES, 1, 1, PIECE, 64], BOXED)
    added = gl.allocate_shared_memory(gl.float32, [2 * ADDED, 1, PIECE, 32], BOXED_SUMS)
    # Columns of all units of a block lie together, as the layout of the whole block has them.
    k_smem = k_pieces._reinterpret(dtype, [STAGES, COLS, D], FLAT)
    v_smem = v_pieces._reinterpret(dtype, [STAGES, COLS, D], FLAT)
    sums = added._reinterpret(gl.float32, [2, COLS, D], SUMS)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # Weights and their gradients of both warpgroups: written, and read by both.
    made = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    used = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    mbarrier.init(made, count=2)
    mbarrier.init(used, count=1)
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    queue = make_queue(6)
    buffers = (q_smem, do_smem, p_smem, ds_smem, k_smem, v_smem, sums)
    barriers = (k_ready, k_free, v_ready, v_free, made, used, full, free)
    # Arguments are written out: constants kept in a tuple of their own would become numbers.
    gl.warp_specialize(
        [
            (_consume_bwd, (
                0, queue, Q, Dout, Out, Lse, Dq, buffers, barriers, tables, sizes, scale, strides,
                GROUP, TOKENS, UNIT, COLS, D, STAGES, EVEN, EVEN_TILES,
            )),
            (_consume_bwd, (
                1, queue, Q, Dout, Out, Lse, Dq, buffers, barriers, tables, sizes, scale, strides,
                GROUP, TOKENS, UNIT, COLS, D, STAGES, EVEN, EVEN_TILES,
            )),
            (_collect, (queue, buffers, barriers, tables, sizes, UNIT, COLS, D, EVEN)),
            (copy_blocks, (
                0, 1, Begun, queue, Kd, k_pieces, k_ready, k_free, tables, sizes, UNIT, COLS, D,
                STAGES, EVEN,
            )),
            (copy_blocks, (
                0, 1, None, queue, Vd, v_pieces, v_ready, v_free, tables, sizes, UNIT, COLS, D,
                STAGES, EVEN,
            )),
            (_add, (
                0, queue, Dvd, added, full, free, tables, sizes, UNIT, COLS, D, EVEN,
            )),
            (_add, (
                1, queue, Dkd, added, full, free, tables, sizes, UNIT, COLS, D, EVEN,
            )),
        ],
        [4, 4, 1, 1, 1, 1],
        [192, 96, 24, 24, 24, 24],
    )  # fmt: skip


def block_sparse_attention_bwd_hopper(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lists: BlockLists,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `block_sparse_attention_bwd` but for the order of sums; see `dispatch.on_hopper`."""
    tiles, units, span, index, count, tile_tokens, unit, lead, tile_lead = lists
    batch, heads, num_queries, head_dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    num_tiles, num_units, list_length = tiles.shape[1], units.shape[1], index.shape[-1]
    order, inner, begun = sorted_lists(
        kv_heads, num_queries, tiles, units, span, index, count, tile_tokens, unit, lead, tile_lead
    )
    cols, stages = BLOCKS[head_dim]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    before = max(lead, 0)
    size = 2, batch * kv_heads, before + num_keys, head_dim
    sums = q.new_zeros(size, dtype=torch.float32)
    box = [1, min(unit, cols), 32]
    added = [
        TensorDescriptor(x, list(x.shape), list(x.stride()), box, BOXED_SUMS.value) for x in sums
    ]
    items = num_tiles * batch * kv_heads
    launch(
        _block_sparse_attention_bwd_hopper, (min(items, multiprocessors(q)),),
        q, *(boxes(x, min(unit, cols)) for x in (k, v)), out, dout, lse, dq, *added, tiles, units,
        span, order, inner, count, begun, scale, items, num_queries, num_keys, num_tiles, num_units,
        list_length, kv_heads, lead, tile_lead, *q.stride()[:3], *dout.stride()[:3],
        *out.stride()[:3], GROUP=heads // kv_heads, TOKENS=tile_tokens, EVEN=lead >= 0,
        EVEN_TILES=tile_lead >= 0, UNIT=unit, COLS=cols, D=head_dim, STAGES=stages, num_warps=4,
    )  # fmt: skip
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    of_keys = sums[:, :, before:].unflatten(1, (batch, kv_heads))
    torch.mul(of_keys[0], scale, out=dk)
    dv.copy_(of_keys[1])
    return dq, dk, dv

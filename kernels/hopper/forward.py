"""Forward for Hopper: warp-specialised, with `wgmma` and the copy engine, written in Gluon.

Two warps copy the listed units of keys and of values into shared memory, box by box; two warpgroups
of 64 rows each do the products and the softmax. At a head dim of 128 scores of a block are issued
before values of the last are used (the schedule of FlashAttention-3: Shah et al., 2024); at one of
64 four warpgroups serve two tiles, and fill each other's gaps. Programs stay, and serve the tiles
that one of their copying warps draws from a counter.

B batch, H query heads, K KV heads, G = H / K, N query tokens, M key tokens, D head dim,
T tiles, U units, L list length
"""

# Triton launches are subscripts of a jit function, which pyright cannot follow.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportOperatorIssue=false
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

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
    rows_of_tile,
    sorted_lists,
    take,
)
from mm_sparse.kernels.paged.pages import Pages
from mm_sparse.kernels.paged.placed_lists import placed_lists
from mm_sparse.kernels.sizes import cdiv, new_output
from mm_sparse.kernels.triton.primitives import COUNTS

# By head dim: keys of a block, blocks in flight, tiles that a program serves at a time.
BLOCKS = {64: (64, 3, 2), 128: (128, 2, 1)}


@gluon.jit
def _masked(
    s, j, row, place, tables, sizes, GROUP: gl.constexpr, TOKENS: gl.constexpr, UNIT: gl.constexpr,
    COLS: gl.constexpr, EVEN: gl.constexpr, EVEN_TILES: gl.constexpr,
):  # fmt: skip
    """Scores of a block, minus infinity where a row does not see a key."""
    Tiles, _units, Span, _order, _inner, _count = tables
    num_queries = sizes[1]
    batch, t, list_, inner, count = place
    token, _g, exists = rows_of_tile(Tiles, batch, sizes, t, row, GROUP, TOKENS, EVEN_TILES)
    span = Span + (batch * num_queries + token) * 2
    low = gl.load(span, mask=exists, other=0)
    width = gl.load(span + 1, mask=exists, other=0) - low
    column = j * COLS + gl.arange(0, COLS, gl.SliceLayout(0, s.type.layout))
    key, there = listed_keys(column, tables, sizes, batch, list_, inner, count, UNIT, EVEN)
    # One comparison for both ends: a key before the first is far behind the last without a sign.
    behind = (gl.where(there, key, -1)[None, :] - low[:, None]).to(gl.uint32)
    return gl.where(behind < width[:, None].to(gl.uint32), s, -float("inf"))


@gluon.jit
def _consume_fwd(
    w: gl.constexpr, queue, Q, Out, Lse, buffers, tables, sizes, scale2, strides,
    GROUP: gl.constexpr, TOKENS: gl.constexpr, UNIT: gl.constexpr, COLS: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr, EVEN_TILES: gl.constexpr,
):  # fmt: skip
    """64 rows of one tile after the other."""
    q_smem, _k, _v, k_smem, v_smem, k_ready, k_free, v_ready, v_free, v_clean = buffers
    Tiles = tables[0]
    num_queries, kv_heads = sizes[1], sizes[6]
    stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on = strides
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    whole: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows_o: gl.constexpr = gl.SliceLayout(1, o_layout)
    rows_w: gl.constexpr = gl.SliceLayout(1, whole)
    dtype: gl.constexpr = q_smem.dtype
    q = q_smem.index(w)
    dim = gl.arange(0, D, gl.SliceLayout(0, whole))[None, :]
    step, cleaned, turn = 0, 0, 0
    batch, head, t = take(queue, turn, 4)
    while t >= 0:
        list_, inner, main, total, count = one_list(batch, head, t, tables, sizes, UNIT, COLS)
        wide = batch.to(gl.int64)
        place = (wide, t, list_, inner, count)
        row = w * 64 + gl.arange(0, 64, rows_w)
        token, g, exists = rows_of_tile(Tiles, wide, sizes, t, row, GROUP, TOKENS, EVEN_TILES)
        base = wide * stride_qb + (head * GROUP + g).to(gl.int64) * stride_qh
        base += token * stride_qn
        q.store(gl.load(Q + base[:, None] + dim, mask=exists[:, None], other=0.0))
        fence_async_shared()
        top = gl.full([64], -float("inf"), gl.float32, rows_s)
        weight = gl.zeros([64], gl.float32, rows_s)
        acc = gl.zeros([64, D], gl.float32, o_layout)
        first = 0
        if D == 128:
            # Two warpgroups alone: scores of a block are begun before values of the last are used.
            first = main
            if main > 0:
                stage = step % STAGES
                mbarrier.wait(k_ready.index(stage), step // STAGES % 2)
                s = gl.zeros([64, COLS], gl.float32, s_layout)
                s = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), s, use_acc=False)
                mbarrier.arrive(k_free.index(stage))
                top = gl.max(s, 1) * scale2
                s = gl.exp2(s * scale2 - top[:, None])
                weight = gl.sum(s, 1)
                mbarrier.wait(v_ready.index(stage), step // STAGES % 2)
                mbarrier.wait(
                    k_ready.index((step + 1) % STAGES), (step + 1) // STAGES % 2, pred=main > 1
                )
                for j in range(1, main):
                    before = step % STAGES
                    stage = (step + 1) % STAGES
                    # Carried in float32: of 16-bit numbers each would take a register of its own.
                    p = gl.convert_layout(s.to(dtype), p_layout)
                    s_next = warpgroup_mma(
                        q, k_smem.index(stage).permute((1, 0)), s, use_acc=False, is_async=True
                    )
                    acc_next = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
                    s = warpgroup_mma_wait(1, deps=(s_next,))
                    mbarrier.arrive(k_free.index(stage))
                    new_top = gl.maximum(top, gl.max(s, 1) * scale2)
                    decay = gl.exp2(top - new_top)
                    s = gl.exp2(s * scale2 - new_top[:, None])
                    weight = weight * decay + gl.sum(s, 1)
                    top = new_top
                    # Between softmax and product: the branches of these waits keep the compiler
                    # from waiting for the product first.
                    mbarrier.wait(
                        k_ready.index((step + 2) % STAGES), (step + 2) // STAGES % 2,
                        pred=j + 1 < main,
                    )  # fmt: skip
                    mbarrier.wait(v_ready.index(stage), (step + 1) // STAGES % 2)
                    acc, p, s = warpgroup_mma_wait(0, deps=(acc_next, p, s))
                    mbarrier.arrive(v_free.index(before))
                    acc = acc * gl.convert_layout(decay, rows_o)[:, None]
                    step += 1
                stage = step % STAGES
                p = gl.convert_layout(s.to(dtype), p_layout)
                acc = warpgroup_mma(p, v_smem.index(stage), acc)
                mbarrier.arrive(v_free.index(stage))
                step += 1
        # What the two or four warpgroups run must stay within what a multiprocessor keeps of
        # instructions, so that all blocks of a small head dim, masked or not, share this loop.
        for j in range(first, total):
            stage = step % STAGES
            phase = step // STAGES % 2
            mbarrier.wait(k_ready.index(stage), phase)
            s = gl.zeros([64, COLS], gl.float32, s_layout)
            s = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), s, use_acc=False)
            mbarrier.arrive(k_free.index(stage))
            if j >= main:
                own = w * 64 + gl.arange(0, 64, rows_s)
                s = _masked(
                    s, j, own, place, tables, sizes, GROUP, TOKENS, UNIT, COLS, EVEN, EVEN_TILES
                )
            new_top = gl.maximum(top, gl.max(s, 1) * scale2)
            # A row that has seen nothing yet keeps -inf as its top; exp2(-inf - 0) is 0.
            shift = gl.where(new_top == -float("inf"), 0.0, new_top)
            decay = gl.exp2(top - shift)
            s = gl.exp2(s * scale2 - shift[:, None])
            weight = weight * decay + gl.sum(s, 1)
            top = new_top
            acc = acc * gl.convert_layout(decay, rows_o)[:, None]
            p = gl.convert_layout(s.to(dtype), p_layout)
            mbarrier.wait(v_ready.index(stage), phase)
            if not EVEN:  # noqa: SIM102 - a constant, and a branch
                if j >= main:
                    # Each warpgroup cleans half of a block, and waits for the other half.
                    clean(
                        v_smem.index(stage), j, w, whole, wide, list_, inner, count, tables, sizes,
                        UNIT, COLS,
                    )  # fmt: skip
                    fence_async_shared()
                    gl.thread_barrier()
                    mbarrier.arrive(v_clean.index(cleaned % STAGES))
                    mbarrier.wait(v_clean.index(cleaned % STAGES), cleaned // STAGES % 2)
                    cleaned += 1
            acc = warpgroup_mma(p, v_smem.index(stage), acc)
            mbarrier.arrive(v_free.index(stage))
            step += 1
        some = weight != 0
        weight = gl.where(some, weight, 1.0)
        lse = gl.where(some, top / LOG2E + gl.log(weight), -float("inf"))
        row = w * 64 + gl.arange(0, 64, rows_s)
        token, g, exists = rows_of_tile(Tiles, wide, sizes, t, row, GROUP, TOKENS, EVEN_TILES)
        heads = (wide * kv_heads + head) * GROUP + g
        gl.store(Lse + heads * num_queries + token, lse, mask=exists)
        acc = acc * gl.convert_layout(1 / weight, rows_o)[:, None]
        # Through shared memory, where q was, so that rows are written whole.
        q.store(acc.to(dtype))
        row = w * 64 + gl.arange(0, 64, rows_w)
        token, g, exists = rows_of_tile(Tiles, wide, sizes, t, row, GROUP, TOKENS, EVEN_TILES)
        base = wide * stride_ob + (head * GROUP + g).to(gl.int64) * stride_oh
        base += token * stride_on
        gl.store(Out + base[:, None] + dim, q.load(whole), mask=exists[:, None])
        turn += 1
        batch, head, t = take(queue, turn, 4)


@gluon.jit
def _buffers(
    dtype: gl.constexpr, UNIT: gl.constexpr, COLS: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Shared memory of one producer and its two consumers: q; k and v as boxes and as blocks."""
    PIECE: gl.constexpr = UNIT if UNIT < COLS else COLS
    BOXES: gl.constexpr = STAGES * (D // 64) * (COLS // PIECE)
    q_smem = gl.allocate_shared_memory(dtype, [2, 64, D], FLAT)
    k_pieces = gl.allocate_shared_memory(dtype, [BOXES, 1, 1, PIECE, 64], BOXED)
    v_pieces = gl.allocate_shared_memory(dtype, [BOXES, 1, 1, PIECE, 64], BOXED)
    # 64 columns of all units of a block lie together, as the layout of the whole block has them.
    k_smem = k_pieces._reinterpret(dtype, [STAGES, COLS, D], FLAT)
    v_smem = v_pieces._reinterpret(dtype, [STAGES, COLS, D], FLAT)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # Barriers that no one waits for are given away to what is allocated next, and must not be made.
    v_clean = v_free
    if not EVEN:
        v_clean = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
        if not EVEN:
            mbarrier.init(v_clean.index(i), count=2)
    return q_smem, k_pieces, v_pieces, k_smem, v_smem, k_ready, k_free, v_ready, v_free, v_clean


@gluon.jit(do_not_specialize=COUNTS)
def _block_sparse_attention_fwd_hopper(
    Q, Kd, Vd, Out, Lse, Tiles, Units, Span, Order, Placed, Inner, Count, Begun, scale,
    items, num_queries, num_keys, num_tiles, num_units, list_length, kv_heads, lead, tile_lead,
    stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on, GROUP: gl.constexpr,
    TOKENS: gl.constexpr, EVEN: gl.constexpr, EVEN_TILES: gl.constexpr, UNIT: gl.constexpr,
    COLS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = Q.dtype.element_ty
    tables = (Tiles, Units, Span, Order, Inner, Count)
    # Who copies asks where units stand in memory, who masks where they stand in the sequence.
    places = (Tiles, Units, Span, Placed, Inner, Count)
    sizes = (
        items, num_queries, num_keys, num_tiles, num_units, list_length, kv_heads, lead, tile_lead
    )  # fmt: skip
    strides = (stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on)
    scale2 = scale * LOG2E
    # Arguments are written out: constants kept in a tuple of their own would become numbers.
    # Of a pair of buffers: 1 and 2 the boxes of k and v, 5 to 8 their barriers.
    one = _buffers(dtype, UNIT, COLS, D, STAGES, EVEN)
    tiles_of_one = make_queue(3)
    if D == 128:
        gl.warp_specialize(
            [
                (_consume_fwd, (
                    0, tiles_of_one, Q, Out, Lse, one, tables, sizes, scale2, strides, GROUP,
                    TOKENS, UNIT, COLS, D, STAGES, EVEN, EVEN_TILES,
                )),
                (_consume_fwd, (
                    1, tiles_of_one, Q, Out, Lse, one, tables, sizes, scale2, strides, GROUP,
                    TOKENS, UNIT, COLS, D, STAGES, EVEN, EVEN_TILES,
                )),
                (copy_blocks, (
                    0, 1, Begun, tiles_of_one, Kd, one[1], one[5], one[6],
                    places, sizes, UNIT, COLS, D, STAGES, EVEN,
                )),
                (copy_blocks, (
                    0, 1, None, tiles_of_one, Vd, one[2], one[7], one[8],
                    places, sizes, UNIT, COLS, D, STAGES, EVEN,
                )),
            ],
            [4, 1, 1],
            [232, 40, 40],
        )  # fmt: skip
    else:
        # A small head dim leaves registers for two tiles at a time, whose softmaxes and products
        # fill each other's gaps.
        two = _buffers(dtype, UNIT, COLS, D, STAGES, EVEN)
        tiles_of_two = make_queue(3)
        gl.warp_specialize(
            [
                (_consume_fwd, (
                    0, tiles_of_one, Q, Out, Lse, one, tables, sizes, scale2, strides, GROUP,
                    TOKENS, UNIT, COLS, D, STAGES, EVEN, EVEN_TILES,
                )),
                (_consume_fwd, (
                    1, tiles_of_one, Q, Out, Lse, one, tables, sizes, scale2, strides, GROUP,
                    TOKENS, UNIT, COLS, D, STAGES, EVEN, EVEN_TILES,
                )),
                (_consume_fwd, (
                    0, tiles_of_two, Q, Out, Lse, two, tables, sizes, scale2, strides, GROUP,
                    TOKENS, UNIT, COLS, D, STAGES, EVEN, EVEN_TILES,
                )),
                (_consume_fwd, (
                    1, tiles_of_two, Q, Out, Lse, two, tables, sizes, scale2, strides, GROUP,
                    TOKENS, UNIT, COLS, D, STAGES, EVEN, EVEN_TILES,
                )),
                (copy_blocks, (
                    0, 2, Begun, tiles_of_one, Kd, one[1], one[5], one[6],
                    places, sizes, UNIT, COLS, D, STAGES, EVEN,
                )),
                (copy_blocks, (
                    0, 2, None, tiles_of_one, Vd, one[2], one[7], one[8],
                    places, sizes, UNIT, COLS, D, STAGES, EVEN,
                )),
                (copy_blocks, (
                    1, 2, Begun, tiles_of_two, Kd, two[1], two[5], two[6],
                    places, sizes, UNIT, COLS, D, STAGES, EVEN,
                )),
                (copy_blocks, (
                    1, 2, None, tiles_of_two, Vd, two[2], two[7], two[8],
                    places, sizes, UNIT, COLS, D, STAGES, EVEN,
                )),
            ],
            [4, 4, 4, 1, 1, 1, 1],
            [112, 112, 112, 32, 32, 32, 32],
        )  # fmt: skip


def block_sparse_attention_fwd_hopper(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float,
    pages: Pages | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `block_sparse_attention_fwd`, where `dispatch.on_hopper` says so.

    Of `pages`, one row with units from its first key on; what they hold behind its end must be
    finite.
    """
    tiles, units, span, index, count, tile_tokens, unit, lead, tile_lead = lists
    batch, heads, num_queries, head_dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    num_tiles, num_units, list_length = tiles.shape[1], units.shape[1], index.shape[-1]
    group = heads // kv_heads
    out = new_output(q)
    lse = q.new_empty(batch, heads, num_queries, dtype=torch.float32)
    order, inner, begun = sorted_lists(
        kv_heads, num_queries, tiles, units, span, index, count, tile_tokens, unit, lead, tile_lead
    )
    placed = order if pages is None else placed_lists(index, count, pages)
    cols, stages, workers = BLOCKS[head_dim]
    described = [boxes(x, min(unit, cols)) for x in (k, v)]
    items = num_tiles * batch * kv_heads
    launch(
        _block_sparse_attention_fwd_hopper, (min(cdiv(items, workers), multiprocessors(q)),),
        q, *described, out, lse, tiles, units, span, order, placed, inner, count, begun, scale,
        items, num_queries, num_keys, num_tiles, num_units, list_length, kv_heads, lead, tile_lead,
        *q.stride()[:3], *out.stride()[:3], GROUP=group, TOKENS=tile_tokens, EVEN=lead >= 0,
        EVEN_TILES=tile_lead >= 0, UNIT=unit, COLS=cols, D=head_dim, STAGES=stages, num_warps=4,
    )  # fmt: skip
    return out, lse

"""What attention is timed on and against: inputs, block lists, and how each peer is called.

A peer is imported when it is built and never needed. Peers keep one list per query head and 128
query tokens, where `attend` shares a list between the heads of a group.
B batch, H query heads, K KV heads, N tokens, D head dim, T tiles of queries, U blocks of keys
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mm_sparse.attention import attend
from mm_sparse.config import SparseConfig
from mm_sparse.layout import TokenLayout
from mm_sparse.selection import Selection, lists_to_mask, select


@dataclass(frozen=True)
class Shape:
    """One problem."""

    tokens: int
    query_heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    causal: bool = False
    batch: int = 1
    queries: int | None = None
    """The last query tokens, all if None."""

    @property
    def heads(self) -> str:
        """As a table shows them."""
        return f"{self.query_heads}/{self.kv_heads}"


@dataclass
class Implementation:
    """Something that attends."""

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    dout: Tensor
    backward: Callable[[], Any] | None = None
    """Its own gradients instead of autograd's."""
    tokens_first: bool = False
    """Whether the output is (B, N, H, D)."""
    density: float = 1.0
    index_bytes: int = 0

    def check(self, expected: Tensor) -> None:
        """Refuse an output that is not what `attend` gives, up to rounding."""
        out = self.run().transpose(1, 2) if self.tokens_first else self.run()
        error = ((out - expected).float().norm() / expected.float().norm()).item()
        if not error < 0.02:
            raise ValueError(f"its output is off by {error:.3g} of what it should be")


@dataclass(frozen=True)
class Problem:
    """Inputs that all contestants of a shape share."""

    shape: Shape
    leaves: tuple[Tensor, Tensor, Tensor]
    """q, k, v."""
    dout: Tensor


def inputs(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random q, k, v (leaves) and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int, tokens: int) -> Tensor:
        size = (shape.batch, heads, tokens, shape.head_dim)
        return torch.randn(size, device=device, dtype=dtype, generator=generator)

    n, m = shape.queries or shape.tokens, shape.tokens
    q, k, v = draw(shape.query_heads, n), draw(shape.kv_heads, m), draw(shape.kv_heads, m)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), draw(shape.query_heads, n)


def settings(shape: Shape, unit: int, ratio: float) -> SparseConfig:
    """Config that never runs dense; cuDNN's even number of blocks sets the budget if not causal."""
    tokens = None
    if not shape.causal and shape.tokens >= 16384:
        tokens = math.ceil(ratio * shape.tokens / 256) * 256
    config = SparseConfig(
        ratio, tokens, unit=unit, causal=shape.causal, dense_below=0, deterministic=True
    )
    return config if shape.causal else replace(config, sinks=0, window=0)


def random_selection(shape: Shape, config: SparseConfig, device: str) -> Selection:
    """Units kept at random, as many for every tile as the budget allows."""
    layout = TokenLayout.text(shape.batch, shape.tokens, device=device)
    queries, heads = shape.queries, shape.query_heads
    plan = layout.plan(
        config, num_query_heads=heads, num_kv_heads=shape.kv_heads, num_queries=queries
    )
    size = (shape.batch, shape.kv_heads, plan.tiles.shape[1], plan.units.shape[1])
    generator = torch.Generator(device).manual_seed(1)
    values = torch.rand(size, device=device, generator=generator)
    return select(values, layout, config, num_query_heads=heads, num_queries=queries)


def peer_selection(shape: Shape, config: SparseConfig, device: str) -> Selection:
    """The random selection with one list per query head: equal to ours where K = H."""
    chosen = random_selection(replace(shape, query_heads=shape.kv_heads), config, device)
    group = shape.query_heads // shape.kv_heads
    index, count = (x.repeat_interleave(group, 1) for x in (chosen.index, chosen.count))
    return Selection(index, count, chosen.plan)


def attend_reference(problem: Problem, selection: Selection) -> Tensor:
    """What every peer must give on `peer_selection`, by `attend`."""
    group = problem.shape.query_heads // problem.shape.kv_heads
    q, k, v = (x.detach() for x in problem.leaves)
    return attend(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), selection)


def block_masks(selection: Selection, heads: int) -> tuple[Tensor, Tensor]:
    """Kept blocks that need no mask and those on the diagonal: two (B, `heads`, T, U) bool."""
    plan = selection.plan
    if not (plan.regular and plan.regular_tiles):
        raise ValueError(f"tokens must be a multiple of {plan.tile_tokens}, got {plan.num_queries}")
    kept = lists_to_mask(selection.index, selection.count, plan.units.shape[1])
    kept = kept.repeat_interleave(heads // kept.shape[1], 1)
    low = plan.tiles[:, None, :, :1]
    last = (plan.units[..., 0] + plan.unit - 1)[:, None, None]
    clear = (last <= low) if plan.config.causal else torch.ones_like(kept)
    return kept & clear, kept & ~clear


def listed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Count and ids, the marked ones first and ascending, along the last dimension: int32."""
    order = mask.int().argsort(dim=-1, descending=True, stable=True)
    return mask.sum(-1, dtype=torch.int32).contiguous(), order.to(torch.int32).contiguous()


def flex_mask(selection: Selection, heads: int) -> Any:
    """FlexAttention's BlockMask of a regular selection, full blocks apart from the diagonal."""
    from torch.nn.attention.flex_attention import BlockMask

    def seen(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kv <= q

    plan = selection.plan
    full, diagonal = block_masks(selection, heads)
    return BlockMask.from_kv_blocks(
        *listed(diagonal),
        *listed(full),
        BLOCK_SIZE=(plan.tile_tokens, plan.unit),
        mask_mod=seen if plan.config.causal else None,
        seq_lengths=(plan.num_queries, plan.layout.length),
    )


def flex_runner(selection: Selection, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """FlexAttention, compiled, on the very blocks of a regular selection."""
    from torch import _dynamo
    from torch.nn.attention.flex_attention import flex_attention

    mask = flex_mask(selection, q.shape[1])
    # Past the limit of recompilations it would run unfused.
    _dynamo.reset()
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    # Its default of 128 keys does not divide smaller blocks.
    options = {"fwd_BLOCK_N": selection.plan.unit} if selection.plan.unit < 128 else None
    given = {"block_mask": mask, "enable_gqa": q.shape[1] != k.shape[1], "kernel_options": options}
    return lambda: compiled(q, k, v, **given)


def flex_blocks(problem: Problem, selection: Selection) -> Implementation:
    """FlexAttention; its BlockMask with transposed lists is made outside."""
    return Implementation(flex_runner(selection, *problem.leaves), problem.leaves, problem.dout)


def sdpa(problem: Problem, backend: SDPBackend | None) -> Implementation:
    """torch's SDPA by one backend, or as torch chooses."""
    shape = problem.shape
    options: Any = {"is_causal": shape.causal, "enable_gqa": shape.query_heads != shape.kv_heads}

    def run() -> Tensor:
        if backend is None:
            return scaled_dot_product_attention(*problem.leaves, **options)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*problem.leaves, **options)

    return Implementation(run, problem.leaves, problem.dout)


def eager(problem: Problem) -> Implementation:
    """softmax(QK)V with all scores in memory, forward."""
    shape, (q, k, v) = problem.shape, problem.leaves
    group = shape.query_heads // shape.kv_heads
    size = shape.tokens if shape.causal else 0
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)

    def run() -> Tensor:
        keys, values = (x.repeat_interleave(group, 1) for x in (k, v)) if group > 1 else (k, v)
        scores = (q * shape.head_dim**-0.5) @ keys.transpose(-1, -2)
        scores = scores.masked_fill_(future, float("-inf")) if size else scores
        return scores.softmax(-1) @ values

    return Implementation(run, problem.leaves, problem.dout)


def _fa4(problem: Problem, **options: Any) -> Implementation:
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    moved = [x.detach().transpose(1, 2).contiguous() for x in (*problem.leaves, problem.dout)]
    leaves = tuple(x.requires_grad_() for x in moved[:3])

    def run() -> Tensor:
        out = flash_attn_func(*leaves, **options)
        return out[0] if isinstance(out, tuple) else out

    return Implementation(run, leaves, moved[3], tokens_first=True)


def fa4_dense(problem: Problem) -> Implementation:
    """flash-attn-4 (CuTe), dense."""
    return _fa4(problem, causal=problem.shape.causal)


def fa4_blocks(problem: Problem, selection: Selection) -> Implementation:
    """flash-attn-4 (CuTe) on blocks; transposed lists are made outside."""
    from flash_attn.cute import block_sparsity  # pyright: ignore[reportMissingImports]

    size = (selection.plan.tile_tokens, selection.plan.unit)

    def tensors(full: Tensor, diagonal: Tensor) -> Any:
        names = ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx")
        values = dict(zip(names, (*listed(diagonal), *listed(full)), strict=True))
        return block_sparsity.BlockSparseTensorsTorch(**values, block_size=size)

    full, diagonal = block_masks(selection, problem.shape.query_heads)
    options: dict[str, Any] = {}
    if problem.shape.causal:
        from cutlass import cute  # pyright: ignore[reportMissingImports]

        @cute.jit
        def seen(b, h, q, kv, seqlen_info, aux_tensors):
            return kv <= q

        options["mask_mod"] = seen
    return _fa4(
        problem,
        block_sparse_tensors=tensors(full, diagonal),
        block_sparse_tensors_bwd=tensors(full.transpose(-1, -2), diagonal.transpose(-1, -2)),
        **options,
    )


def cudnn_index(selection: Selection, heads: int) -> Tensor:
    """(B, `heads`, N / block, blocks) int32: cuDNN's blocks of queries are as long as of keys."""
    plan = selection.plan
    kept = int(selection.count.max())
    if not (plan.regular and plan.regular_tiles) or int(selection.count.min()) != kept:
        raise ValueError("lists must be of one length and tiles whole")
    group = heads // selection.index.shape[1]
    index = selection.index[..., :kept].int().repeat_interleave(group, 1)
    return index.repeat_interleave(plan.tile_tokens // plan.unit, 2).contiguous()


def cudnn_blocks(problem: Problem, selection: Selection) -> Implementation:
    """NVIDIA's cuDNN block-sparse attention, which has no causal mask."""
    from cudnn.block_sparse_attention import api  # pyright: ignore[reportMissingImports]

    if problem.shape.causal:
        raise NotImplementedError("cuDNN block-sparse attention has no causal mask")
    index, block = cudnn_index(selection, problem.shape.query_heads), selection.plan.unit
    lists = (index, index.shape[-1])
    leaves = tuple(x.detach() for x in problem.leaves)
    forward = partial(api.block_sparse_attention_forward, *leaves, *lists, sparse_block_size=block)
    gradients = partial(api.block_sparse_attention_backward, sparse_block_size=block)
    saved = forward()
    given = (problem.dout, *leaves, saved["o_tensor"], saved["lse_tensor"], *lists)
    return Implementation(
        lambda: forward()["o_tensor"], leaves, problem.dout, backward=partial(gradients, *given)
    )


SPARSE_PEERS: tuple[tuple[str, str, Callable[..., Implementation], tuple[int, ...]], ...] = (
    ("flash-attn-4", "fa4", fa4_blocks, (128,)),
    ("cudnn", "cudnn", cudnn_blocks, (128, 64)),
    ("flex", "flex", flex_blocks, (128, 64)),
)
"""Name, family, how it is built, and the blocks that it takes."""

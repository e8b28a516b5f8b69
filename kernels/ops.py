"""`mm_sparse::attend` for torch: registration, autograd, and the choice of an implementation.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim, T tiles,
U units, L list length
"""

from functools import cache

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mm_sparse.kernels import cpu
from mm_sparse.kernels.block_lists import BlockLists
from mm_sparse.kernels.device import interpreted, runs_triton
from mm_sparse.kernels.sizes import new_output

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UNITS = (16, 32, 64, 128)


def supports(q: Tensor, k: Tensor, unit: int, backend: str = "auto") -> str | None:
    """Why the kernels cannot serve these tensors; None if they can."""
    on_gpu, dtypes = q.is_cuda and backend != "torch", DTYPES
    if not runs_triton(q, backend):
        dtypes = (*DTYPES, torch.float64)
        if backend == "auto" and q.device.type != "cpu":
            return f"no kernel runs on {q.device}; backend 'torch' gathers there"
    elif not on_gpu and not (q.device.type == "cpu" and interpreted()):
        return (
            f"backend {backend!r} needs a CUDA GPU (or TRITON_INTERPRET=1), "
            f"tensors are on {q.device}"
        )
    if q.dtype not in dtypes:
        return f"dtype must be one of {', '.join(map(str, dtypes))}, got {q.dtype}"
    if unit not in UNITS:
        return f"unit must be one of {UNITS}, got {unit}"
    if on_gpu and q.shape[-1] > 256:
        return f"head dim must be at most 256, got {q.shape[-1]}"
    if on_gpu and _capability(q.device) < (8, 0):
        return "needs compute capability 8.0 (A100) or newer"
    if k.shape[2] >= 2**31 or q.shape[2] >= 2**31:
        return "needs fewer than 2**31 tokens"
    return None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _run(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    if runs_triton(q, backend):
        from mm_sparse.kernels import dispatch

        return dispatch.forward(q, k, v, lists, scale)
    with torch.autocast(q.device.type, enabled=False):
        return cpu.gathered_attention_fwd(q, k, v, lists, scale)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, units: Tensor, span: Tensor, index: Tensor,
    count: Tensor, tile_tokens: int, unit: int, unit_offset: int, tile_offset: int, scale: float,
    backend: str, deterministic: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention on lists of units: out (B, H, N, D) and its log-sum-exp (B, H, N) float32."""
    lists = BlockLists(
        tiles, units, span, index, count, tile_tokens, unit, unit_offset, tile_offset
    )
    return _run(q, k, v, lists, scale, backend)


attend_op = torch.library.custom_op("mm_sparse::attend", _attend, mutates_args=())


def attend(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attend_op`, without the 0.1 ms of the dispatcher where nobody listens to it."""
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if wanted or torch.compiler.is_compiling() or _listening(q):
        return attend_op(q, k, v, *lists, scale, backend, deterministic)
    if runs_triton(q, backend):
        from mm_sparse.kernels import dispatch

        return dispatch.forward(q, k, v, lists, scale)
    return _run(q, k, v, lists, scale, backend)


def _listening(q: Tensor) -> bool:
    """Whether a profiler, a mode, a transform or a subclass of tensors must see the operator."""
    return (
        type(q) not in (Tensor, torch.nn.Parameter)
        or _get_current_dispatch_mode() is not None
        or peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or _profiler_enabled()
    )


@torch.library.custom_op("mm_sparse::attend_backward", mutates_args=())
def attend_backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor,
    units: Tensor, span: Tensor, index: Tensor, count: Tensor, tile_tokens: int, unit: int,
    unit_offset: int, tile_offset: int, scale: float, backend: str, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `attend_op` for q, k and v; they repeat bit for bit if deterministic."""
    lists = BlockLists(
        tiles, units, span, index, count, tile_tokens, unit, unit_offset, tile_offset
    )
    if runs_triton(q, backend):
        from mm_sparse.kernels import dispatch

        deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
        return dispatch.backward(dout, q, k, v, out, lse, lists, scale, deterministic)
    with torch.autocast(q.device.type, enabled=False):
        return cpu.gathered_attention_bwd(dout, q, k, v, out, lse, lists, scale)


@attend_op.register_fake
def _(
    q, k, v, tiles, units, span, index, count, tile_tokens, unit, unit_offset, tile_offset, scale,
    backend, deterministic=True,
):  # fmt: skip
    return new_output(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@attend_backward_op.register_fake
def _(
    dout, q, k, v, out, lse, tiles, units, span, index, count, tile_tokens, unit, unit_offset,
    tile_offset, scale, backend, deterministic,
):  # fmt: skip
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup(ctx, inputs, output):
    q, k, v, tiles, units, span, index, count, *constants = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, tiles, units, span, index, count)
    ctx.constants = constants
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _):
    if dout is None:
        return (None,) * 15
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    grads = attend_backward_op(dout, *ctx.saved_tensors, *ctx.constants)
    return (*grads, *(None,) * 12)


attend_op.register_autograd(_backward, setup_context=_setup)

"""Launch a Triton kernel again for less than what Triton's own launch costs the host.

Triton looks at every argument of every launch to find the compiled kernel. Here what it would find
is looked up by a coarser key: types, and what numbers and pointers divide by.
"""

# Attributes of compiled kernels, which pyright does not know.
# pyright: reportAttributeAccessIssue=false
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from mm_sparse.kernels.device import interpreted

# How a compiled kernel is called changes from release to release: this is how 3.6 does.
KNOWN_RELEASE = triton.__version__.startswith("3.6.")
# Compiled kernel and constants by key; forgotten when there are more.
MOST_KEPT = 4096
_compiled: dict[Any, Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)`.

    Args:
        args: what comes before the constants in the kernel's signature, all of it.
        constants: its `tl.constexpr`, and options of the launch.
    """
    if not KNOWN_RELEASE or interpreted() or torch.compiler.is_compiling() or _listened(kernel):
        kernel[grid](*args, **constants)
        return
    device = driver.active.get_current_device()
    key = id(kernel), device, *constants, *constants.values(), *map(form, args)
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*args, **constants)
        if len(_compiled) >= MOST_KEPT:
            _compiled.clear()
        _compiled[key] = compiled, compiled.run, _tail(kernel, len(args), constants)
        return
    compiled, run, tail = found
    run(
        *grid, *(1,) * (3 - len(grid)), driver.active.get_current_stream(device),
        compiled.function, compiled.packed_metadata, None, None, None, *args, *tail,
    )  # fmt: skip


def form(x: Any) -> Any:
    """What of an argument decides which compiled kernel serves it.

    Triton asks for no more: whether a number is 1, divides by 16 and fits in 32 bits, and whether
    a pointer divides by 16.
    """
    kind = type(x)
    if kind is Tensor or isinstance(x, Tensor):
        return x.dtype if x.data_ptr() & 15 == 0 else (x.dtype, "odd")
    if kind is int:
        if 1 < x < 0x80000000:
            return x & 15 == 0
        return x == 1, x & 15 == 0, -0x80000000 <= x < 0x80000000, x >= 1 << 63
    if x is None or kind is float:
        return kind
    if kind is bool:
        return kind, x
    # A tensor descriptor.
    return kind, x.base.dtype, *x.block_shape


def _listened(kernel: Any) -> bool:
    """Whether somebody, such as a profiler of Triton's, wants to hear of launches."""
    runtime = knobs.runtime
    hooks = (runtime.launch_enter_hook.calls, runtime.launch_exit_hook.calls, kernel.pre_run_hooks)
    return any(hooks)


def _tail(kernel: Any, given: int, constants: dict[str, Any]) -> tuple[Any, ...]:
    """Constants in the order of the signature, as a compiled kernel wants them behind the rest."""
    params = kernel.params
    if any(p.is_constexpr for p in params[:given]):
        raise ValueError(f"args must hold no constants of {kernel}, got {given} arguments")
    missing = [p.name for p in params[given:] if not p.is_constexpr]
    if missing:
        raise ValueError(f"args must hold all of {kernel}'s, got {given} without {missing}")
    return tuple(
        constants.get(p.name, p.default if p.has_default else None) for p in params[given:]
    )

"""What the device of a tensor is, and whether Triton interprets."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor


@cache
def interpreted() -> bool:
    """Whether Triton runs in its interpreter, on CPU tensors; Triton reads it once, too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(x: Tensor, backend: str) -> bool:
    """Whether Triton kernels serve a tensor; otherwise PyTorch gathers, on any device.

    The one place that decides which implementation runs: scoring, selection and attention ask it.
    """
    return (x.is_cuda and backend != "torch") or backend == "triton"


def generation(x: Tensor) -> int:
    """Major compute capability: 8 Ampere and Ada, 9 Hopper, 10 Blackwell, 12 its desktop kind."""
    # What the interpreter runs is what Hopper would.
    return _known(x.device)[0] if x.is_cuda else 9


def multiprocessors(x: Tensor) -> int:
    """Of the GPU that holds x; the interpreter counts as an H100."""
    return _known(x.device)[1] if x.is_cuda else 132


@cache
def _known(device: torch.device) -> tuple[int, int]:
    """Major compute capability and multiprocessors; torch takes 10 us to say each."""
    found = torch.cuda.get_device_properties(device)
    return found.major, found.multi_processor_count

"""What the device of a tensor is, and whether Triton interprets."""

from __future__ import annotations

import os
import threading
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


class _Streams(threading.local):
    """The stream that a thread used last outside of a capture."""

    last = 0


_STREAMS = _Streams()


def stream_of(device: torch.device) -> int:
    """Number of a device's current stream, 0 off CUDA: another one might read what it makes early.

    A capture takes part in the stream that its thread used before: what was made there is made.
    """
    if device.type != "cuda":
        return 0
    if not torch.cuda.is_current_stream_capturing():
        _STREAMS.last = torch._C._cuda_getCurrentRawStream(device.index or 0)
    return _STREAMS.last


def captures(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, which will read the tensors of now for ever."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


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

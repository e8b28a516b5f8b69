"""Processes of torchrun that read a prompt together, and of which the first writes the answer."""

from __future__ import annotations

import os
from typing import Any


def processes() -> int:
    """How many torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes the answer."""
    return os.environ.get("RANK", "0") == "0"


def join_processes(device: Any) -> Any:
    """Meet the other processes, if there are any; the device of this one.

    Args:
        device: of a single process.

    Raises:
        ValueError: there are more processes than GPUs.
    """
    if processes() == 1:
        return device
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        number, most = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= most:
            raise ValueError(
                f"--nproc-per-node must be at most the {most} GPUs of this machine, got process "
                f"{number + 1}"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def leave_processes() -> None:
    """Close what `join_processes` opened."""
    if processes() > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def share_prompt(model: Any) -> None:
    """Let all processes share the prompts of a model, a dense one as well.

    Raises:
        ValueError: its heads cannot be split between so many.
    """
    if processes() == 1:
        return
    import mm_sparse as mms
    from mm_sparse.integrations import is_sparsified

    if not is_sparsified(model):
        mms.sparsify(model, mms.SparseConfig.preset("text", backend="dense"), strict=False)
    mms.sequence_parallel(model)


class SilentStreamer:
    """Takes tokens and prints none."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def put(self, value: Any) -> None:
        """Take the prompt, or a token."""

    def end(self) -> None:
        """Print nothing."""

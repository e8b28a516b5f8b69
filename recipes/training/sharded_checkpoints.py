"""Checkpoints as folders: each process writes its part of the weights and of the optimizer's state.

Nothing is put together on one process. Any number of processes reads its own parts of such a
folder, one process reads all of it, and `join_checkpoint` makes the file of it that one process
would have written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

REST = "rest.pt"
"""File of what is no tensor of weights or of an optimizer, beside torch's own files."""
INDEX = ".metadata"
"""File that torch writes last."""
Like = Callable[[str, torch.Size], Tensor | None]
"""Where a tensor of a name and of a whole size is read into; None leaves it out."""


def is_sharded(path: str | Path) -> bool:
    """Whether a path is a folder of `write_parts`."""
    return (Path(path) / INDEX).is_file() and (Path(path) / REST).is_file()


def write_parts(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Write a checkpoint of Lightning, of which each process has its parts; all must call it.

    A run that is cut off meanwhile leaves the folder that was there before.
    """
    first = dist.get_rank() == 0
    # Not the name that it gets: a reader takes what is there for whole.
    part = folder.with_name(f".{folder.name}.part")
    if first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    save(dict(_tensors(checkpoint)), storage_writer=FileSystemWriter(part))
    if first:
        torch.save(_rest(checkpoint), part / REST)
        if folder.is_dir():
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)
        part.rename(folder)
    dist.barrier()


def read_parts(folder: Path, like: Like, *, weights_only: bool | None = None) -> dict[str, Any]:
    """What `write_parts` was given, each tensor as a process wants it.

    Args:
        like: tensors to read into, for names "state_dict.NAME" and
            "optimizer_states.OPTIMIZER.PARAMETER.NAME".
    """
    reader = FileSystemReader(folder)
    wanted: dict[str, Any] = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            target = like(name, stored.size)
            if target is not None:
                wanted[name] = target
    alone = not (dist.is_available() and dist.is_initialized())
    load(wanted, storage_reader=reader, no_dist=alone)
    checkpoint: dict[str, Any] = torch.load(
        folder / REST, map_location="cpu", weights_only=weights_only
    )
    checkpoint["state_dict"] = {}
    for name, value in wanted.items():
        kind, _, place = name.partition(".")
        if kind == "state_dict":
            checkpoint["state_dict"][place] = value
        else:
            number, parameter, entry = place.split(".", 2)
            state = checkpoint["optimizer_states"][int(number)]["state"]
            state.setdefault(int(parameter), {})[entry] = value
    return checkpoint


def read_rest(path: str | Path) -> dict[str, Any]:
    """A checkpoint, file or folder, on the CPU; of a folder without weights.

    Raises:
        ValueError: it is neither.
    """
    path = Path(path)
    if not path.is_file() and not is_sharded(path):
        raise ValueError(
            f"checkpoint must be a file, or a folder of sharded_checkpoints, got {str(path)!r}, "
            "which is none"
        )
    file = path if path.is_file() else path / REST
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint, file or folder, whole and on the CPU.

    Raises:
        ValueError: it is neither.
    """
    path = Path(path)
    if not is_sharded(path):
        return read_rest(path)
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    kinds = {
        name: entry.properties.dtype
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    return read_parts(
        path, lambda name, size: torch.empty(size, dtype=kinds[name]), weights_only=True
    )


def join_checkpoint(folder: str | Path, file: str | Path) -> None:
    """Write the file of a folder of `write_parts` that one process would have written.

    Raises:
        ValueError: it is no such folder, or the file is there.
    """
    if not is_sharded(folder):
        raise ValueError(f"checkpoint must be a folder of sharded_checkpoints, got {str(folder)!r}")
    if Path(file).exists():
        raise ValueError(f"file must be new, got {str(file)!r}, which exists")
    torch.save(read_checkpoint(folder), file)


def _tensors(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in checkpoint["state_dict"].items():
        yield f"state_dict.{name}", value
    for number, record in enumerate(checkpoint.get("optimizer_states", ())):
        for parameter, state in record["state"].items():
            for entry, value in state.items():
                if isinstance(value, Tensor):
                    yield f"optimizer_states.{number}.{parameter}.{entry}", value


def _rest(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in checkpoint.items() if name != "state_dict"}
    if "optimizer_states" in rest:
        rest["optimizer_states"] = [
            {**record, "state": {n: _without_tensors(s) for n, s in record["state"].items()}}
            for record in rest["optimizer_states"]
        ]
    return rest


def _without_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not isinstance(value, Tensor)}

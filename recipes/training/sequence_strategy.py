"""Lightning's strategy of processes that share sequences, and checkpoints for any number of them.

D groups of processes, each with batches of its own, times P processes that share a sequence
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mm_sparse.recipes.training.sharded_checkpoints import is_sharded, read_parts, write_parts

TIMEOUT = timedelta(minutes=30)


class SequenceParallelStrategy(ModelParallelStrategy):
    """Processes in groups of P that share their sequences, with whole weights or sharded ones.

    The mesh is (D, P), under the names that `ModelParallelStrategy` gives its dimensions; the
    processes of a group are given the same batch. A module says what that means for it in
    `configure_model`: see `share_sequences`. Checkpoints are files as one process writes them:
    any number of processes, and any strategy, resumes from them. Sharded ones are folders, from
    which any number of processes of this strategy resumes, and of which `join_checkpoint` makes
    such files.

    Args:
        sequence: P, it divides the number of processes.
        shard: hold a part of all weights, gradients and states of the optimizer on each of the
            processes (FSDP2); else each has them all.
        process_group_backend: "nccl" or "gloo"; that of the device if None.
        timeout: of a collective.
        sharded_checkpoints: each process writes its part of a checkpoint; else the first one puts
            all of it together.

    Raises:
        ValueError: `sequence` is below 1; when it is set up, P does not divide the processes.
    """

    def __init__(
        self, sequence: int = 1, shard: bool = False, process_group_backend: str | None = None,
        timeout: timedelta = TIMEOUT, sharded_checkpoints: bool = False,
    ) -> None:  # fmt: skip
        if sequence < 1:
            raise ValueError(f"sequence must be at least 1, got {sequence}")
        super().__init__(
            tensor_parallel_size=sequence, save_distributed_checkpoint=False,
            process_group_backend=process_group_backend, timeout=timeout,
        )  # fmt: skip
        self.sequence, self.shard = sequence, shard
        self.sharded_checkpoints = sharded_checkpoints

    def setup_environment(self) -> None:
        processes = self.num_nodes * self.num_processes
        if processes % self.sequence:
            raise ValueError(
                f"sequence must divide the {processes} processes (trainer.devices), got "
                f"{self.sequence}"
            )
        self._data_parallel_size = processes // self.sequence
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on the first process, nothing on the others; all must call it.

        Of a sharded checkpoint, each has its parts.
        """
        module: Any = self.lightning_module
        state = module.state_dict()
        stored = module.stored_names() if hasattr(module, "stored_names") else set(state)
        if self.sharded_checkpoints:
            return {name: value.detach() for name, value in state.items() if name in stored}
        whole = {name: _whole(value) for name, value in state.items() if name in stored}
        return whole if self.is_global_zero else {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module: Any = self.lightning_module
        own = module.state_dict()
        given = checkpoint["state_dict"]
        state = {name: _as_part(x, own[name]) if name in own else x for name, x in given.items()}
        module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, whole on the first process, empty elsewhere.

        Of a sharded checkpoint, each has its parts.
        """
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        record = optimizer.state_dict()
        if self.sharded_checkpoints:
            return record
        record["state"] = {
            number: {name: _whole(x) for name, x in own.items()}
            for number, own in sorted(record["state"].items())
        }
        return record if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, given in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            saved = [number for group in given["param_groups"] for number in group["params"]]
            if len(saved) != len(parameters):
                raise ValueError(
                    f"checkpoint must be of a run that trains as many parameters, {len(parameters)}"
                    f", got {len(saved)}"
                )
            place = dict(zip(saved, parameters, strict=True))
            state = {
                number: {name: _as_part(x, place[number]) for name, x in own.items()}
                for number, own in given["state"].items()
            }
            optimizer.load_state_dict({**given, "state": state})

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(self.broadcast(str(checkpoint_path)))
        if is_sharded(path):
            return read_parts(path, self._part_like, weights_only=weights_only)
        if not path.is_file():
            raise ValueError(
                f"checkpoint must be a file, or a folder of sharded_checkpoints, got {str(path)!r}"
            )
        # Processes of a host read the same pages.
        return torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        if not self.sharded_checkpoints:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise TypeError("storage_options must be None for sharded checkpoints")
        write_parts(checkpoint, Path(self.broadcast(str(filepath))))

    def _part_like(self, name: str, size: torch.Size) -> Tensor | None:
        """Where this process reads its part of a tensor of a sharded checkpoint into."""
        kind, _, place = name.partition(".")
        if kind == "state_dict":
            # Of weights that are not there it is left to `load_state_dict` to complain.
            own = self._own_weights.get(place)
            return torch.empty(size) if own is None else torch.empty_like(own)
        number, parameter, _ = place.split(".", 2)
        if int(number) >= len(self.optimizers):
            return None  # Validation has none.
        groups = self.optimizers[int(number)].param_groups
        parameters = [p for group in groups for p in group["params"]]
        like = parameters[int(parameter)].detach() if int(parameter) < len(parameters) else None
        if like is None or like.shape != size:
            return torch.empty(size)
        return torch.empty_like(like)

    @property
    def _own_weights(self) -> dict[str, Tensor]:
        module: Any = self.lightning_module
        return module.state_dict()


def whole_tensors(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Sharded tensors put together, on the CPU, and the others as they are.

    Every process must ask for the same ones.
    """
    return {n: _whole(x) if isinstance(x, DTensor) else x for n, x in named}


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        part: Any = value.detach()
        return part.full_tensor().cpu()
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _as_part(value: Any, like: Any) -> Any:
    """A whole tensor as the part of it that a process holds of one of the same shape."""
    if isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value
    if not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    mesh = like.device_mesh
    # Each process has the whole: nothing travels.
    return distribute_tensor(value.to(mesh.device_type), mesh, like.placements, src_data_rank=None)

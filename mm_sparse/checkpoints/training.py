"""Scorers in training: in a model's checkpoints, among what processes average, resumed with it.

Scorers stand outside the module tree, so that a model's weights keep their names.
`register_scorers` puts them into it while a model is trained; callbacks save them beside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from mm_sparse.checkpoints.format import read_scorers, write_scorers
from mm_sparse.integrations import hold_scorers, is_sparsified, scorers_of, state_of

M = TypeVar("M", bound=nn.Module)
FOLDER = "scorers"


def register_scorers(model: M) -> M:
    """Make the scorers of a sparsified model a submodule of it, for training.

    They are then in its `state_dict`, in `model.parameters()`, and among what DDP averages: call it
    before the optimizer and before DDP. A checkpoint without scorers loads with a warning.
    `densify` takes them out again; `sparsify` puts the new ones in.

    Raises:
        ValueError: the model is not sparsified, or no layer has a scorer with weights.

    Example:
        >>> mms.sparsify(model, config, scorer="relevance")
        >>> mms.register_scorers(model)
        >>> optimizer = torch.optim.AdamW(model.parameters())
    """
    state, scorers = state_of(model), scorers_of(model)
    if next(scorers.parameters(), None) is None:
        raise ValueError(
            "model must have scorers with weights to register, got none: give `sparsify` a scorer"
        )
    hold_scorers(model, scorers)
    if all(holder is not model for holder in state.holders):
        state.holders.append(model)
    return model


def average_scorer_gradients(model: nn.Module) -> None:
    """Average the gradients of scorers over all processes; call it between backward and step.

    For loops in which DDP does not see the scorers: a loss that is taken every n-th step, or FSDP.
    The first call also gives all processes the scorers of the first one. Without a process group it
    does nothing. Every process must call it.
    """
    state = state_of(model)
    if not _processes():
        return
    import torch.distributed as dist

    parameters = [p for p in scorers_of(model).parameters() if p.requires_grad]
    if not state.shared.averaged:
        state.shared.averaged = True
        for value in (*parameters, *scorers_of(model).buffers()):
            dist.broadcast(value.data, 0)
    if not parameters:
        return
    # Of a process whose layers all ran dense there is none.
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, mean in zip(parameters, flat.split([g.numel() for g in grads]), strict=True):
        parameter.grad = mean.view_as(parameter).clone()


def _processes() -> int:
    """Processes of the running group, 0 without one."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0


def scorer_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the scorers of a sparsified model, for a checkpoint of one's own."""
    return scorers_of(model).state_dict()


def load_scorer_state(model: nn.Module, state: Mapping[str, Tensor] | None) -> None:
    """Inverse of `scorer_state`; of a checkpoint without scorers (None) it only warns.

    Raises:
        ValueError: the state is of other scorers.
    """
    if state is None:
        warnings.warn(
            "the checkpoint holds no scorers, those of the model stay as they are", stacklevel=2
        )
        return
    scorers = scorers_of(model)
    wanted, given = set(scorers.state_dict()), set(state)
    if wanted != given:
        odd = sorted(wanted ^ given)[0]
        raise ValueError(f"state must be of the model's scorers, {odd} is in one of both only")
    scorers.load_state_dict(dict(state))


def save_in(model: nn.Module, folder: Path) -> None:
    """Scorers of a model at full precision, into a checkpoint's folder."""
    state = state_of(model)
    write_scorers(state.layers, state.shared.config, folder / FOLDER)


def restore_from(model: nn.Module, folder: Path) -> None:
    """Read what `save_in` wrote into the scorers that a model has: optimizers know them."""
    if not (folder / FOLDER).is_dir():
        load_scorer_state(model, None)
        return
    stored = read_scorers(folder / FOLDER)
    names = {layer.name: name for name, layer in state_of(model).layers.items()}
    stored = stored.named_as(list(names.values()))
    load_scorer_state(model, {
        f"{name.replace('.', '/')}.{key}": value
        for (name, _, key), value in ((k.partition(":"), v) for k, v in stored.tensors.items())
    })  # fmt: skip


def sparsified_parts(module: nn.Module) -> dict[str, nn.Module]:
    """The outermost sparsified models inside a module, by name."""
    if not is_sparsified(module):
        return {}
    try:
        state_of(module)
    except ValueError:
        parts = {
            f"{name}.{inner}" if inner else name: part
            for name, child in module.named_children()
            for inner, part in sparsified_parts(child).items()
        }
        return parts
    return {"": module}

"""What `sparsify` did to a model, found from its attention layers, and what can be asked of it.

The layers say to which state they belong. So it is found in whatever wraps, merges, copies or
unwraps the model afterwards: a PEFT model and its merged base, DDP, a compiled model, an average.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from mm_sparse.config import SparseConfig
from mm_sparse.integrations.forward_context import ForwardMemory
from mm_sparse.integrations.hf.modality_tracker import ModalityTracker
from mm_sparse.integrations.hf.packed_tower import PackedTower
from mm_sparse.integrations.layer import LAYER, SparseLayer
from mm_sparse.integrations.shared_state import Shared
from mm_sparse.integrations.standby.standby import NamedConfig
from mm_sparse.integrations.tower_tokens import TowerTokens
from mm_sparse.integrations.towers.patch_order import OrderedBlocks


@dataclass(eq=False)
class State:
    """What `sparsify` did to a model."""

    shared: Shared
    layers: dict[str, SparseLayer]
    """By name in the model that `sparsify` was given."""
    trackers: list[ModalityTracker]
    towers: list[TowerTokens | PackedTower]
    blocks: list[OrderedBlocks]
    memory: ForwardMemory
    """Of all blocks that hold layers."""
    root: str = ""
    """Class of the model that `sparsify` was given."""
    handles: list[Any] = field(default_factory=list)
    modules: tuple[type[nn.Module], ...] = ()
    """Classes that `sparsify(modules=...)` named."""
    before: list[NamedConfig] = field(default_factory=list)
    """Configs, the attention implementation that each named, and the one that it names now."""
    holders: list[nn.Module] = field(default_factory=list)
    """Models that have the scorers as a submodule."""

    def __post_init__(self) -> None:
        for layer in self.layers.values():
            layer.state = self


def states_in(model: nn.Module) -> list[State]:
    """The states to which layers of a model belong: one for each call of `sparsify`."""
    layers = (vars(module).get(LAYER) for module in model.modules())
    states = {id(layer.state): layer.state for layer in layers if layer is not None}
    return list(states.values())


def is_sparsified(model: nn.Module) -> bool:
    """Whether attention layers of a model were given to `sparsify`."""
    return any(LAYER in vars(module) for module in model.modules())


def part_of(model: nn.Module, state: State) -> bool:
    """Whether a model holds some layers of a state, but not all."""
    inside = {id(module) for module in model.modules()}
    return any(id(layer.module) not in inside for layer in state.layers.values())


def state_of(model: nn.Module) -> State:
    """The state of a sparsified model, with layers by their names in this very model.

    Raises:
        ValueError: the model is not sparsified, or parts of it are, each for itself.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    named = {
        name: vars(module)[LAYER] for name, module in model.named_modules() if LAYER in vars(module)
    }
    states = {id(layer.state): layer.state for layer in named.values()}
    if not states:
        raise ValueError(f"model must be sparsified, got a {type(model).__name__} that is not")
    if len(states) > 1:
        roots = ", ".join(state.root for state in states.values())
        raise ValueError(
            f"model must be sparsified as a whole, got a {type(model).__name__} whose parts are, "
            f"each for itself ({roots}): name a part, or sparsify the whole"
        )
    state = next(iter(states.values()))
    if list(named) == list(state.layers):
        return state
    seen = replace(state, layers={})
    seen.layers = named
    return seen


def sparse_config(model: nn.Module) -> SparseConfig:
    """The config of a sparsified model."""
    return state_of(model).shared.config


def attention_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The attention layers of a sparsified model by name."""
    return dict(state_of(model).layers)


def scorers_of(model: nn.Module) -> nn.ModuleDict:
    """The scorers of a sparsified model; "/" stands for "." in the names of layers.

    They are the very modules that the layers use. As a submodule of a LightningModule
    (`self.scorers = mms.scorers_of(self.model)`) they are in its checkpoints, in its optimizer, and
    among what DDP averages; `mms.register_scorers` makes them a submodule of the model itself.
    """
    state = state_of(model)
    state.shared.owned = True
    return _scorers(state)


def scorer_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What an optimizer trains when only scorers are trained."""
    return _scorers(state_of(model)).parameters()


def _scorers(state: State) -> nn.ModuleDict:
    scorers = {name: la.scorer for name, la in state.layers.items() if la.scorer is not None}
    return nn.ModuleDict({name.replace(".", "/"): scorer for name, scorer in scorers.items()})

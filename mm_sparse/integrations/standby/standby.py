"""Layers that a model never gives enough tokens to run sparse: they are left as they were.

Such a layer costs nothing on top. What can make it run sparse after all has it wrapped first: a
block with other settings, longer inputs than the model is made for, ranks that share sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from threading import RLock
from typing import TYPE_CHECKING, Any

from mm_sparse.attention import BREAK_EVEN
from mm_sparse.config import SparseConfig

if TYPE_CHECKING:
    from mm_sparse.integrations.forward_context import ForwardMemory
    from mm_sparse.integrations.layer import SparseLayer

NamedConfig = tuple[Any, str, str]
"""A config, the attention implementation that it named, and the one that `sparsify` names."""
_LOCK = RLock()
# By id of a config, how many want it to name the attention of sparse layers: models may share one.
_WANTED: dict[int, int] = {}


def name_sparse(configs: Iterable[NamedConfig]) -> None:
    """Have configs name the attention of sparse layers."""
    with _LOCK:
        for config, _, name in configs:
            _WANTED[id(config)] = _WANTED.get(id(config), 0) + 1
            config._attn_implementation_internal = name


def no_longer_wanted(configs: Iterable[NamedConfig]) -> list[NamedConfig]:
    """Undo `name_sparse` but for the names; gives the configs that nobody else wants."""
    left: list[NamedConfig] = []
    with _LOCK:
        for config, before, name in configs:
            count = _WANTED.pop(id(config), 1) - 1
            if count > 0:
                _WANTED[id(config)] = count
            else:
                left.append((config, before, name))
    return left


def surely_short(tokens: int | None, config: SparseConfig) -> bool:
    """Whether calls of at most so many tokens are dense on every device; None: of any number."""
    return tokens is not None and tokens < shortest_sparse(config)


def shortest_sparse(config: SparseConfig) -> int:
    """Tokens from which on a call may run sparse on some device."""
    own = config.dense_below
    return min(BREAK_EVEN["call"].values()) if own is None else own


class Standby:
    """Layers of a model that are wrapped only while something can make them run sparse.

    Args:
        layers: they are not attached before.
        configs: that these layers alone go by.
        memory: knows whether a checkpoint may compute blocks again, as they were in a block of
            other settings.
    """

    def __init__(
        self, layers: Iterable[SparseLayer], configs: Iterable[NamedConfig], memory: ForwardMemory
    ) -> None:
        self.layers, self.configs, self.memory = list(layers), list(configs), memory
        self.wrapped = False
        """Whether the modules of the layers ask them."""
        self._blocks = 0
        self._stays = False

    @property
    def least(self) -> int:
        """Tokens from which on a call may run sparse outside of blocks with other settings."""
        return shortest_sparse(self.layers[0].shared.base.config)

    def see(self, tokens: int | None) -> None:
        """Before a forward with so many tokens; None: nobody knows how many."""
        if not self._stays and (tokens is None or tokens >= self.least):
            self.stay()

    def stay(self) -> None:
        """Wrap the layers for good."""
        with _LOCK:
            self._stays = True
            self._wrap()

    def enter(self) -> None:
        """Wrap the layers for a block of other settings."""
        with _LOCK:
            self._blocks += 1
            self._wrap()

    def leave(self) -> None:
        """Undo `enter`, unless a checkpoint may compute something of the block again."""
        with _LOCK:
            self._blocks -= 1
            if not (self._stays or self._blocks or self.memory.may_recompute):
                self._unwrap()

    def take_out(self) -> None:
        """Leave the layers as they were, whatever was said before."""
        with _LOCK:
            self._stays = False
            self._unwrap()

    def _wrap(self) -> None:
        if self.wrapped:
            return
        self.wrapped = True
        name_sparse(self.configs)
        for layer in self.layers:
            layer.wrap()

    def _unwrap(self) -> None:
        if not self.wrapped:
            return
        self.wrapped = False
        for config, before, name in no_longer_wanted(self.configs):
            # Unless `set_attn_implementation` named another one since.
            if config._attn_implementation == name:
                config._attn_implementation_internal = before
        for layer in self.layers:
            layer.unwrap()

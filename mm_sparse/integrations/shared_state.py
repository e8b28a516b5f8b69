"""What the layers of a sparsified model have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

from torch import Tensor

from mm_sparse.config import SparseConfig
from mm_sparse.integrations.call import AttentionCall
from mm_sparse.integrations.forward_context import ForwardMemory, assigned, current
from mm_sparse.integrations.layout_cache import LayoutCache, PlainLayouts
from mm_sparse.integrations.standby.standby import Standby
from mm_sparse.scorers import Scorer

CHANGED = [0]
"""How many blocks with other settings are entered, in all threads; compiled graphs guard on it."""
_LOCK = Lock()


@contextmanager
def counted_as_changed() -> Iterator[None]:
    """Around a block in which something holds that no compiled graph knows."""
    with _LOCK:
        CHANGED[0] += 1
    try:
        yield
    finally:
        with _LOCK:
            CHANGED[0] -= 1


@dataclass(frozen=True, eq=False)
class Settings:
    """How layers attend now; `override_config` and its kin change them around a block."""

    config: SparseConfig
    watchers: tuple[Callable[[AttentionCall], None], ...] = ()
    attention_override: Callable[[AttentionCall], Tensor] | None = None
    """Computes the attention of a sparse layer in place of score, select, attend."""
    timed: bool = False
    scored: bool = False
    """Whether a watcher asks for scores and selection of all queries of a call."""
    scorers: Mapping[str, Scorer | None] = field(default_factory=dict)
    """Scorers by name of the layer, in place of the layers' own."""
    recomputed: bool = False
    """Whether a checkpoint computes a block again: watchers have seen its calls already."""

    def when_recomputed(self) -> Settings:
        """The same for a block that a checkpoint computes again."""
        return replace(self, recomputed=True)


@dataclass(eq=False)
class Shared:
    """What the layers of a sparsified model have in common."""

    base: Settings
    """Outside of all blocks that change them."""
    strict: bool
    memory: ForwardMemory | None = None
    plain: PlainLayouts = field(default_factory=PlainLayouts)
    own: dict[Any, tuple[SparseConfig, SparseConfig]] = field(default_factory=dict)
    """By name of a layer and prefix: `config` as it was, and the layer's own."""
    masked: LayoutCache = field(default_factory=LayoutCache)
    owned: bool = False
    """Whether the scorers were handed out as modules: who took them trains and saves them."""
    averaged: bool = False
    """Whether the gradients of the scorers are averaged over processes by a call of its own."""
    distilled: int = 0
    """Forward passes in which scorers learned while nobody was known to average them."""
    standbys: list[Standby] = field(default_factory=list)
    """Layers that are wrapped only while something can make them run sparse."""
    turn: int = 0
    """Blocks so far in which scorers learned: whose turn it is."""

    @property
    def settings(self) -> Settings:
        """How layers attend now, in this thread."""
        return current(self, self.base)

    @property
    def config(self) -> SparseConfig:
        return self.settings.config

    @contextmanager
    def changed(self, **changes: Any) -> Iterator[None]:
        """Other settings around a block, in this thread, also where blocks are recomputed later."""
        if self.memory is not None:
            self.memory.attach()
        for standby in self.standbys:
            standby.enter()
        try:
            with counted_as_changed(), assigned(self, replace(self.settings, **changes)):
                yield
        finally:
            for standby in self.standbys:
                standby.leave()

    def layer_config(
        self, index: int | None, name: str, prefix: int, now: SparseConfig | None = None
    ) -> SparseConfig:
        """The config of a layer whose first `prefix` tokens are always kept; checked once.

        Args:
            now: `self.config`, of a caller who knows it.
        """
        now = self.config if now is None else now
        config, made = self.own.get((name, prefix), (None, None))
        if made is None or config is not now:
            made = now.of_layer(index, name)
            if prefix > made.sinks:
                made = replace(made, sinks=prefix)
            self.own[name, prefix] = now, made
        return made

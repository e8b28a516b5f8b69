"""What the layers of a sparsified model have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from mm_sparse.config import SparseConfig
from mm_sparse.integrations.call import AttentionCall
from mm_sparse.integrations.layout_cache import LayoutCache
from mm_sparse.layout import CallLayout


@dataclass
class Shared:
    """What the layers of a sparsified model have in common."""

    config: SparseConfig
    strict: bool
    watchers: list[Callable[[AttentionCall], None]] = field(default_factory=list)
    attention_override: Callable[[AttentionCall], Tensor] | None = None
    """Computes the attention of a sparse layer in place of score, select, attend."""
    timed: bool = False
    plain: dict[Any, CallLayout] = field(default_factory=dict)
    """Layouts of calls without a mask."""
    own: dict[Any, tuple[SparseConfig, SparseConfig]] = field(default_factory=dict)
    """By name of a layer and prefix: `config` as it was, and the layer's own."""
    masked: LayoutCache = field(default_factory=LayoutCache)

    def layer_config(self, index: int | None, name: str, prefix: int) -> SparseConfig:
        """The config of a layer whose first `prefix` tokens are always kept; checked once."""
        config, made = self.own.get((name, prefix), (None, None))
        if made is None or config is not self.config:
            made = self.config.of_layer(index, name)
            if prefix > made.sinks:
                made = replace(made, sinks=prefix)
            self.own[name, prefix] = self.config, made
        return made

"""Which layers of a model are left as they were until something can make them run sparse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mm_sparse.config import SparseConfig
from mm_sparse.integrations.discovery import AttentionModule
from mm_sparse.integrations.hf.attention import HFLayer
from mm_sparse.integrations.hf.discovery import HFAttentionModule
from mm_sparse.integrations.layer import SparseLayer
from mm_sparse.integrations.standby.standby import surely_short


@dataclass(eq=False)
class StandbyGroup:
    """Layers that go by configs that no other layer goes by."""

    layers: list[SparseLayer] = field(default_factory=list)
    configs: dict[int, Any] = field(default_factory=dict)
    """By id."""
    parts: set[int] = field(default_factory=set)
    """Ids by which layers belong together: of configs, or of a tower."""


def standby_groups(
    items: Sequence[AttentionModule], layers: dict[str, SparseLayer], config: SparseConfig
) -> list[StandbyGroup]:
    """Layers whose calls are surely short, by what must be changed for all of them at once.

    transformers asks a config which attention to call, and which masks to make. So a layer stays
    wrapped if one that goes by the same config does.
    """
    idle = [item for item in items if _is_idle(item, layers[item.name], config)]
    while True:
        names = {item.name for item in idle}
        busy = {id(c) for item in items if item.name not in names for c in configs_around(item)}
        left = [item for item in idle if all(id(c) not in busy for c in _own_configs(item))]
        if len(left) == len(idle):
            break
        idle = left
    groups: list[StandbyGroup] = []
    for item in idle:
        configs = {id(c): c for c in configs_around(item) if id(c) not in busy}
        parts = {*configs, id(getattr(item, "tower", None) or item)}
        group = StandbyGroup([layers[item.name]], configs, parts)
        joined = [known for known in groups if known.parts & parts]
        for known in joined:
            groups.remove(known)
        for known in reversed(joined):
            group.layers = known.layers + group.layers
            group.configs |= known.configs
            group.parts |= known.parts
        groups.append(group)
    # Layers that are dense whatever the length are nothing to wait for.
    return [g for g in groups if any(not la.cross for la in g.layers)]


def _is_idle(item: AttentionModule, layer: SparseLayer, config: SparseConfig) -> bool:
    if item.refusal is not None or config.backend == "dense":
        return False
    if isinstance(layer, HFLayer):
        # Other implementations take no mask that a model around the layers makes for sparse ones.
        if layer.original != "sdpa" or layer.packed:
            return False
        if any(hasattr(p, "device_mesh") for p in layer.module.parameters()):
            return False
        if item.cross:
            return True
    return surely_short(item.most_tokens, config)


def configs_around(item: AttentionModule) -> Iterator[Any]:
    """Configs that name the attention of a layer of transformers, or make its masks."""
    if isinstance(item, HFAttentionModule):
        for owner in (item.module, *item.owners):
            config = getattr(owner, "config", None)
            if config is not None:
                yield config


def _own_configs(item: AttentionModule) -> Iterator[Any]:
    """Those that the layer and the innermost model around it have."""
    if isinstance(item, HFAttentionModule):
        for owner in (item.module, item.owners[-1]):
            config = getattr(owner, "config", None)
            if config is not None:
                yield config

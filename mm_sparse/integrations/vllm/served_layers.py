"""The layers of a model that an engine serves: which run sparse, with which scorer.

H query heads, K KV heads, D head dim
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from mm_sparse.attention import PagedGeometry, PagedLayer, serves_pages
from mm_sparse.config import SparseConfig
from mm_sparse.integrations.vllm.settings import ServingSettings
from mm_sparse.scorers import PooledScorer, Scorer, ScorerPart


@dataclass(frozen=True)
class LayerPlan:
    """What one layer of this rank ranks with."""

    config: SparseConfig
    scorer: Scorer


def layer_index(name: str) -> int:
    """Number of a layer in its decoder, of the engine's name for it.

    Raises:
        ValueError: the name has none.
    """
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    if not numbers:
        raise ValueError(f"layer must have a number in its name, got {name!r}")
    return numbers[-1]


def stored_name(names: Mapping[str, Any], index: int) -> str | None:
    """The stored name of a decoder's layer, of which the engine may call modules otherwise.

    Raises:
        ValueError: several are of that number.
    """
    found = [name for name in names if f".{index}." in f".{name}."]
    if len(found) > 1:
        raise ValueError(f"folder must hold one scorer for layer {index}, got those of {found}")
    return found[0] if found else None


def plan_layer(
    name: str, settings: ServingSettings, shape: tuple[int, int, int], rank: int, ranks: int
) -> LayerPlan | None:
    """Config and scorer of a layer; None if it stays dense.

    Args:
        name: of the layer in the engine.
        shape: H, K and D of the whole layer.
        rank, ranks: of tensor parallelism, whose heads are these.
    Raises:
        ValueError: ranks share KV heads, or the folder holds scorers of another model.
    """
    index, whole = layer_index(name), settings.config
    stored = settings.stored
    own = None if stored is None else stored_name(stored.entries, index)
    if stored is not None and own is None:
        return None
    if {index, own, name} & set(whole.dense_layers) or whole.backend == "dense":
        return None
    if shape[1] % ranks:
        raise ValueError(
            f"ranks must have KV heads of their own: {name} has {shape[1]} for {ranks} ranks"
        )
    config = replace(whole.of_layer(index, own or name), dense_layers=())
    scorer = None if stored is None or own is None else stored.scorer_of(own, shape)
    for heads in config.head_counts - {shape[1]}:
        raise ValueError(
            f"config must have a ratio for each of {shape[1]} KV heads of {name}, got {heads}"
        )
    config = config.of_heads(rank, ranks)
    if scorer is None:
        return LayerPlan(config, PooledScorer())
    if ranks > 1:
        scorer = ScorerPart(scorer, shape[:2], rank, ranks)
    return LayerPlan(config, scorer.eval().requires_grad_(False))


class ServedLayers:
    """Layers that share pages, and what the engine's steps are to them.

    Args:
        plans: of the layers that run sparse, by the engine's names.
        group: query heads of a KV head.
        page: tokens of a page.
        rows: most sequences of a step.
        pages: most pages of a sequence.
        memory: pages in memory.
    Raises:
        ValueError: config or scorer of a layer cannot serve pages.
    """

    def __init__(
        self, plans: Mapping[str, LayerPlan], *, group: int, page: int, rows: int, pages: int,
        memory: int, device: torch.device,
    ) -> None:  # fmt: skip
        for name, plan in plans.items():
            reason = serves_pages(plan.config, plan.scorer, page)
            if reason is not None:
                raise ValueError(f"{name} cannot be served by pages of {page} tokens: {reason}")
        # The engine builds its first step in inference mode; the next may be without.
        with torch.inference_mode(False):
            self.geometry = PagedGeometry(
                [plan.config for plan in plans.values()], group=group, page=page, rows=rows,
                pages=pages, memory=memory, device=device,
            )  # fmt: skip
            self.layers = {
                name: PagedLayer(self.geometry, plan.config, plan.scorer.to(device))
                for name, plan in plans.items()
            }

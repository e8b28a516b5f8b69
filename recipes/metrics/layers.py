"""Recall and attention mass of the layers of a sparsified model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mm_sparse as mms
from mm_sparse import PooledScorer, select, unit_mass
from mm_sparse.distillation import attention_kl
from mm_sparse.integrations import (
    AttentionCall,
    attention_layers,
    capture_attention,
    override_config,
)
from mm_sparse.layout import Plan
from mm_sparse.selection import Scores, lists_to_mask


@torch.no_grad()
def layer_figures(
    model: nn.Module,
    ids: Any,
    run: Callable[[Any], Any] | None = None,
    *,
    tiles: int | None = None,
) -> dict[str, dict[str, float]]:
    """By layer of a dense run: divergence, kept mass of what is open, overlap with the perfect.

    Kept mass and overlap also by pair of modalities, query first, where more than one is there.

    Args:
        run: a forward pass on `ids`, that of a language model if None.
        tiles: how many tiles are looked at, evenly spread over those that have a choice. Layers
            whose tiles have none are left out. None: all tiles of all layers.
    """
    served = attention_layers(model)
    by_layer: dict[str, dict[str, float]] = {}

    def measure(call: AttentionCall) -> None:
        scorer = served[call.name].scorer or PooledScorer()
        if call.layout is None:
            return
        plan = call.plan()
        if tiles is not None:
            choice = (plan.open_units > 1).any(0).nonzero().flatten()
            if not len(choice):
                return
            even = torch.linspace(0, len(choice) - 1, min(tiles, len(choice))).round().long()
            plan = plan.select_tiles(choice[even.to(choice.device)])
        values = scorer.score(call.q, call.k, plan, call.scale)
        mass = unit_mass(call.q, call.k, plan, call.scale)
        selected_units, best = (kept_units(x, plan) for x in (values, mass.clamp(min=1e-20).log()))
        open_units = (plan.visible & ~plan.always)[:, None]
        figures = {"divergence": attention_kl(values, mass, plan).item()}
        kinds = plan.unit_modality.unique().tolist()
        pairs = [(a, b) for a in kinds for b in kinds if a >= 0 and b >= 0]
        for pair in [None, *(pairs if len(pairs) > 1 else [])]:
            here = open_units
            if pair is not None:
                here = here & (plan.tile_modality == pair[0])[:, None, :, None]
                here = here & (plan.unit_modality == pair[1])[:, None, None]
            name = "" if pair is None else "/" + ">".join(mms.Modality(m).name for m in pair)
            whole = (mass * here).sum().clamp(min=1e-12)
            figures[f"kept{name}"] = ((mass * (selected_units & here)).sum() / whole).item()
            both, all_best = (selected_units & best & here).sum(), (best & here).sum()
            figures[f"overlap{name}"] = (both / all_best.clamp(min=1)).item()
        by_layer[call.name] = figures

    with override_config(model, backend="dense"), capture_attention(model, measure):
        if run is not None:
            run(ids)
        else:
            model.base_model(ids, use_cache=False)  # type: ignore[operator]
    return by_layer


def kept_units(values: Tensor, plan: Plan) -> Tensor:
    """(B, K, T, U) bool: what `select` keeps."""
    chosen = select(Scores(values, plan), plan.layout, plan.config)
    return lists_to_mask(chosen.index, chosen.count, values.shape[-1])

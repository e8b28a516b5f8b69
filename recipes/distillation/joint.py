"""Train several kinds of scorers of one frozen model on the same samples, in the same order."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mm_sparse import FineScorer
from mm_sparse.distillation import attention_kl, dropped_mass
from mm_sparse.integrations import attention_layers, make_scorer, override_scorers
from mm_sparse.recipes.data import Batch
from mm_sparse.recipes.distillation.distiller import DistillationConfig, LayerFeatures, look
from mm_sparse.recipes.models import MultimodalTraining
from mm_sparse.recipes.training import OptimizerConfig, optimize

OwnScorers = dict[str, FineScorer]
"""By name of the layer."""


def fresh(model: nn.Module, **options: Any) -> OwnScorers:
    """A `FineScorer` with these options for each layer of a sparsified model that runs sparse."""
    made: dict[str, Any] = {
        name: make_scorer(layer, partial(FineScorer, **options), None, True)
        for name, layer in attention_layers(model).items()
        if layer.known_mode()[0] == "sparse"
    }
    if not made:
        raise ValueError("model must have layers that run sparse, got none")
    return made


def train_jointly(
    model: MultimodalTraining,
    batches: Sequence[Batch],
    options: Mapping[str, Mapping[str, Any]],
    goal: DistillationConfig,
    optimizer: OptimizerConfig,
) -> tuple[dict[str, OwnScorers], dict[str, list[float]]]:
    """Train scorers with each of `options` side by side, a step a batch; also their losses.

    The model attends densely and stays as it is. One optimizer holds all: it treats each number
    alone, so none of the scorers knows of another.
    """
    made = {name: fresh(model.language, **own) for name, own in options.items()}
    holder = nn.Module()
    holder.scorers = nn.ModuleList(s for own in made.values() for s in own.values())
    steps = optimize(optimizer, holder, ("scorers",), len(batches))
    adam, schedule = steps["optimizer"], steps["lr_scheduler"]["scheduler"]
    losses: dict[str, list[float]] = {name: [] for name in made}
    for step, batch in enumerate(batches):
        with override_scorers(model.language, next(iter(made.values()))):
            sample = look(
                model.language, lambda b=batch: model.run(b, logits_to_keep=1), goal.tiles
            )
        adam.zero_grad()
        for name, own in made.items():
            if not step:
                for scorer, *seen in zip(own.values(), sample.tiles, sample.units, strict=True):
                    scorer.calibrate(*seen)
            loss = _loss(own, sample, goal, step < goal.divergence_share * len(batches))
            loss.backward()
            losses[name].append(loss.item())
        adam.step()
        schedule.step()
    return made, losses


def _loss(own: OwnScorers, sample: LayerFeatures, goal: DistillationConfig, first: bool) -> Tensor:
    plan, scale = sample.plan, sample.scale
    seen = zip(own.values(), sample.tiles, sample.units, strict=True)
    ranked = [s.rank(tiles, units, plan, scale, torch.float32) for s, tiles, units in seen]
    values = torch.stack(ranked)
    if first:
        return attention_kl(values, sample.mass, plan, weighted=True)
    return dropped_mass(values, sample.mass, plan, goal.temperature, sample.budget)

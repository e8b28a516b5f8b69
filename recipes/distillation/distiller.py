"""Scorers of a frozen model that learn from its own dense attention, all layers at once.

B rows, N tokens, K KV heads, T tiles, U units, L layers
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.func import functional_call

import mm_sparse as mms
from mm_sparse import FineScorer, Modality, unit_mass
from mm_sparse.distillation import attention_kl, dropped_mass
from mm_sparse.integrations import (
    AttentionCall,
    attention_layers,
    capture_attention,
    override_config,
    scorers_of,
)
from mm_sparse.layout import Plan
from mm_sparse.recipes.training import OptimizerConfig, optimize


@dataclass(frozen=True)
class DistillationConfig:
    """What scorers are trained for, first one, then the other."""

    divergence_share: float = 0.1
    """Share of the steps, at the start, that minimise the divergence from the true mass."""
    temperature: float = 0.2
    """Of the soft choice whose dropped mass the other steps minimise."""
    tiles: int = 24
    """Tiles of a sequence that a step looks at, drawn at random."""

    def __post_init__(self) -> None:
        if not 0 <= self.divergence_share <= 1:
            raise ValueError(f"divergence_share must be in [0, 1], got {self.divergence_share}")
        if self.temperature <= 0 or self.tiles < 1:
            raise ValueError(
                f"temperature and tiles must be positive, got {self.temperature} and {self.tiles}"
            )


@dataclass(frozen=True, eq=False)
class LayerFeatures:
    """What the scorers of all layers see of one forward pass: features and true mass by layer."""

    plan: Plan
    """Of the tiles that were drawn."""
    scale: float
    tiles: Tensor
    """(L, B, H, T, S, 3 D)."""
    units: Tensor
    """(L, B, K, U, C, 3 D)."""
    mass: Tensor
    """(L, B, K, T, U)."""
    budget: Tensor
    """(L, B, K, T) key tokens that the best of each layer and head may be."""


class Ranking(nn.Module):
    """`FineScorer.rank` as a forward, for `functional_call`."""

    def __init__(self, scorer: FineScorer) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, tiles: Tensor, units: Tensor, plan: Plan, scale: float) -> Tensor:
        return self.scorer.rank(tiles, units, plan, scale, torch.float32)


def true_mass(call: AttentionCall, plan: Plan) -> Tensor:
    """(B, K, T, U): the share of attention that the units of a call have."""
    return unit_mass(call.q, call.k, plan, call.scale)


@torch.no_grad()
def look(
    model: nn.Module,
    run: Callable[[], Any],
    tiles: int,
    truth: Callable[[AttentionCall, Plan], Tensor] = true_mass,
    *,
    name: str = "model",
) -> LayerFeatures:
    """What the `FineScorer`s of a sparsified model see of so many tiles, drawn at random.

    Args:
        run: runs the model, which attends densely in it.
        truth: what scorers learn to rank the units of a call by.
        name: of the argument that gave the model, for messages.
    """
    served, rows, where = attention_layers(model), [], []

    def keep(call: AttentionCall) -> None:
        scorer = served[call.name].scorer
        if not isinstance(scorer, FineScorer):
            return
        if not where:
            where.append(some_tiles(call.plan(), tiles))
            where.append(call.scale)
        plan = where[0]
        features = scorer.features(call.q, call.k, plan)
        weight = truth(call, plan)
        own = plan if call.config == plan.config else replace(plan, config=call.config)
        rows.append((*features, weight, own.without_sample.head_budget.expand(weight.shape[:-1])))

    with override_config(model, backend="dense"), capture_attention(model, keep):
        run()
    if not rows:
        raise ValueError(f"{name} must run layers with a FineScorer, got none")
    return LayerFeatures(*where, *(torch.stack(x) for x in zip(*rows, strict=True)))


class Distiller(L.LightningModule):
    """Scorers of a frozen model; a subclass says how the model runs on a batch.

    Args:
        model: what gets the scorers.
        sparse: what its layers will keep; None takes the config beside `scorers_from`.
        scorers_from: folder of `save_scorers` to start from; untrained ones if None.
        name: of the argument that gave the model, for messages.
        parts: C of `FineScorer`, where `scorers_from` has none.
        modalities: which have maps of their own.
        out: folder that the scorers are written to at the end.
    """

    def __init__(
        self,
        model: nn.Module,
        sparse: mms.SparseConfig | None,
        goal: DistillationConfig,
        optimizer: OptimizerConfig | None,
        *,
        name: str,
        parts: int,
        modalities: Sequence[Modality],
        out: str | None,
        scorers_from: str | None = None,
    ) -> None:
        super().__init__()
        self.goal, self.optimizer_part = goal, optimizer or OptimizerConfig()
        self.out = out
        model = model.eval().requires_grad_(False)
        if sparse is None and scorers_from is None:
            raise ValueError("sparse must be given where scorers_from is not, got neither")
        if sparse is not None:
            make = partial(FineScorer, parts=parts, modalities=modalities)
            mms.sparsify(model, sparse, scorer=make)
        if scorers_from is not None:
            mms.load_scorers(model, scorers_from)
        self.taught = scorers_from is not None
        # Outside the module: its weights are in no checkpoint of this one.
        self._frozen, self._name = (model,), name
        self.scorers = scorers_of(model).float()
        shapes = {tuple(p.shape for p in s.parameters()) for s in self.scorers.values()}
        if len(shapes) != 1:
            raise ValueError(f"{name} must have layers of one shape, got {len(shapes)} shapes")

    @property
    def model(self) -> Any:
        """The sparsified model."""
        return self._frozen[0]

    def run(self, batch: Any) -> Any:
        """One forward pass of the model."""
        raise NotImplementedError

    def truth(self, call: AttentionCall, plan: Plan) -> Tensor:
        """(B, K, T, U): what scorers learn to rank the units of a call by."""
        return true_mass(call, plan)

    def setup(self, stage: str | None = None) -> None:
        self.model.to(self.trainer.strategy.root_device)

    def look(self, batch: Any, tiles: int) -> LayerFeatures:
        """Run the dense model on a batch: what scorers see of so many tiles, drawn at random."""
        return look(self.model, lambda: self.run(batch), tiles, self.truth, name=self._name)

    def rank(self, sample: LayerFeatures) -> Tensor:
        """(L, B, K, T, U) scores of all layers."""
        own: Any = list(self.scorers.values())
        names = [f"scorer.{name}" for name, _ in own[0].named_parameters()]
        weights = zip(*(scorer.parameters() for scorer in own), strict=True)
        state = {name: torch.stack(each) for name, each in zip(names, weights, strict=True)}
        for name, _ in own[0].named_buffers():
            state[f"scorer.{name}"] = torch.stack([s.get_buffer(name) for s in own])
        frame = Ranking(own[0])

        def one(state: dict[str, Tensor], tiles: Tensor, units: Tensor) -> Tensor:
            return functional_call(frame, state, (tiles, units, sample.plan, sample.scale))

        return torch.vmap(one)(state, sample.tiles, sample.units)

    def on_train_start(self) -> None:
        if self.global_step or self.taught:
            return
        batch = next(iter(self.trainer.train_dataloader))  # type: ignore[arg-type]
        sample = self.look(batch.to(self.device), self.goal.tiles)
        own: Any = self.scorers.values()
        for scorer, tiles, units in zip(own, sample.tiles, sample.units, strict=True):
            scorer.calibrate(tiles, units)

    def done(self) -> float:
        """Share of the steps that are behind."""
        return self.global_step / self.trainer.estimated_stepping_batches

    def training_step(self, batch: Any, index: int) -> Tensor:
        sample, goal = self.look(batch, self.goal.tiles), self.goal
        values = self.rank(sample)
        if self.done() < goal.divergence_share:
            loss = attention_kl(values, sample.mass, sample.plan, weighted=True)
            self.log("train/divergence", loss.detach(), prog_bar=True)
        else:
            loss = dropped_mass(values, sample.mass, sample.plan, goal.temperature, sample.budget)
            self.log("train/dropped", loss.detach(), prog_bar=True)
        return loss

    def log_layers(self, layers: dict[str, dict[str, float]]) -> None:
        """Log `quality.layer_figures`, the mean over layers and each."""
        for name in next(iter(layers.values())):
            mean = sum(figures[name] for figures in layers.values()) / len(layers)
            self.log(f"validation/{name}", mean, sync_dist=True, add_dataloader_idx=False)
        for i, figures in enumerate(layers.values()):
            own = {f"layers/{i:02d}/{name}": value for name, value in figures.items()}
            self.log_dict(own, sync_dist=True, add_dataloader_idx=False)

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        return optimize(self.optimizer_part, self, ("scorers",), steps)

    def configure_callbacks(self) -> list[L.Callback]:
        return [] if self.out is None else [SaveScorers(self.out)]


class SaveScorers(L.Callback):
    """Writes a `Distiller`'s scorers every so many steps, at the end, and when a run breaks off."""

    def __init__(self, folder: str, every: int = 500) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.folder, self.every = folder, every

    def save(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            mms.save_scorers(module.model, self.folder)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            self.save(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.save(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.save(trainer, pl_module)


def some_tiles(plan: Plan, count: int) -> Plan:
    """The plan of `count` of its tiles, drawn at random among those that have a choice."""
    choice = ((plan.visible & ~plan.always).sum(-1) > 1).any(0).nonzero().flatten()
    if not len(choice):
        raise ValueError("tiles must have units to choose from, the sequence is too short for that")
    own = choice[torch.randperm(len(choice), device=choice.device)[:count]].sort().values
    return plan.select_tiles(own)

"""Scorers alone: a frozen model of transformers runs dense, and its layers teach one by one.

A layer's loss is taken back where it arises, so that the memory of a step is that of a forward
pass and of one layer's loss, whatever the number of layers. `Distiller` holds all layers at once
and ranks them in one product, which is faster where everything is small.

B rows, N tokens of a batch
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import mm_sparse as mms
from mm_sparse import FineScorer
from mm_sparse.distillation import dropped_mass
from mm_sparse.integrations import (
    AttentionCall,
    attention_layers,
    capture_attention,
    override_config,
    scorers_of,
)
from mm_sparse.recipes.distillation.distiller import DistillationConfig
from mm_sparse.recipes.distillation.training_rows import Batch, Rows
from mm_sparse.recipes.metrics import layer_figures
from mm_sparse.recipes.training import OptimizerConfig, optimize
from mm_sparse.selection import Scores

CLIP = 1.0
"""Largest norm of the gradients of all scorers."""


@dataclass(frozen=True)
class Length:
    """How long a run is: by steps, or by the time that they take."""

    steps: int | None = None
    hours: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.hours is None):
            raise ValueError(
                f"steps or hours must be given, and not both, got {self.steps} and {self.hours}"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.hours is not None and not 0 < self.hours < math.inf:
            raise ValueError(f"hours must be positive, got {self.hours}")

    def done(self, step: int, seconds: float) -> float:
        """Share of the run that lies behind."""
        if self.steps is not None:
            return step / self.steps
        return seconds / (3600 * (self.hours or 1))


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    tokens: int = 0
    """That the model has read."""
    seconds: float = 0.0
    """That steps took."""
    losses: list[float] = field(default_factory=list)
    """Of each step, mean over layers: divergence first, then the mass that is dropped."""
    first: int = 0
    """Steps on the divergence."""


class ScorerTrainer:
    """Trains the scorers of a sparsified model, step by step.

    Args:
        model: sparsified, with scorers that learn; it is frozen, and put into eval mode.
        rows: what it reads.
        length: of the run, which the learning rate falls over.
        goal: what scorers are trained for.
        optimizer: AdamW over the scorers alone.
        seed: of the tiles that are drawn.
        share_sequences: whether all processes share each sequence in a step, each with some heads;
            they must be given the same rows.
    Raises:
        ValueError: no layer has a scorer that learns, or heads cannot be shared.
    """

    def __init__(
        self,
        model: Any,
        rows: Rows,
        length: Length,
        *,
        goal: DistillationConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        seed: int = 0,
        share_sequences: bool = False,
    ) -> None:
        self.model, self.rows, self.length, self.seed = model, rows, length, seed
        self.goal, self.config = goal or DistillationConfig(), optimizer or OptimizerConfig()
        model.eval().requires_grad_(False)
        self.scorers = scorers_of(model).float().requires_grad_(True)
        if not any(True for _ in self.scorers.parameters()):
            raise ValueError("model must have scorers that learn, got none")
        self.device = next(model.parameters()).device
        self.scorers.to(self.device)
        self.optimizer = optimize(self.config, self, ("scorers",), 1)["optimizer"]  # type: ignore[arg-type]
        self.progress = Progress()
        self.inside_step = False
        """Whether a step has begun and not ended: `state` is then that of no step."""
        self._one_logit = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.share_sequences = share_sequences
        if share_sequences:
            # Refuses what cannot be shared before anything is read or measured.
            mms.sequence_parallel(model).remove()

    @torch.no_grad()
    def run(self, batch: Batch) -> Any:
        """One forward pass, without logits where the model can be told so."""
        more = {"logits_to_keep": 1} if self._one_logit else {}
        return self.model(**self.moved(batch), use_cache=False, **more)

    def moved(self, batch: Batch) -> dict[str, Any]:
        """A batch as the model wants it: on its device, and in its dtype."""
        dtype, moved = self.model.dtype, {}
        for name, value in batch.items():
            if isinstance(value, Tensor):
                wide = value.is_floating_point()
                value = value.to(self.device, dtype if wide else None)
            moved[name] = value
        return moved

    def calibrate(self, batch: Batch) -> None:
        """Set the sizes of features that `FineScorer`s divide by, from tiles of one batch."""
        served = attention_layers(self.model)

        def look(call: AttentionCall) -> None:
            scorer = served[call.name].scorer
            if not isinstance(scorer, FineScorer) or call.layout is None:
                return
            plan = call.plan()
            choice = (plan.open_units > 1).any(0).nonzero().flatten()
            if len(choice):
                even = torch.linspace(0, len(choice) - 1, min(self.goal.tiles, len(choice)))
                plan = plan.select_tiles(choice[even.round().long().to(choice.device)])
                scorer.calibrate(*scorer.features(call.q, call.k, plan))

        with (
            override_config(self.model, backend="dense"),
            capture_attention(self.model, look, scores=False),
        ):
            self.run(batch)

    @property
    def done(self) -> float:
        """Share of the run that lies behind."""
        return self.length.done(self.progress.step, self.progress.seconds)

    def step(self) -> float:
        """One step; the loss, mean over layers."""
        start, now = time.perf_counter(), self.progress
        self.inside_step = True
        batch = self.rows.take()
        done = min(self.done, 1.0)
        loss: dict[str, Any] = {}
        if done >= self.goal.divergence_share:
            loss["loss"] = self._dropped
        else:
            now.first = now.step + 1
        generator = torch.Generator(self.device).manual_seed(self.seed + (now.step << 20))
        layers = len(self.scorers)
        with (
            self._shared() as sequence,
            torch.no_grad(),
            override_config(self.model, backend="dense"),
            mms.distillation_losses(
                self.model, tiles=self.goal.tiles, generator=generator,
                backward_weight=1 / layers, **loss,
            ) as learned,
        ):  # fmt: skip
            self.run(batch if sequence is None else sequence.pad(self.moved(batch)))
        if not learned.losses:
            raise ValueError("model must run layers with scorers, got none in a step")
        if sequence is not None:
            sequence.sum_gradients(self.scorers.parameters())
        torch.nn.utils.clip_grad_norm_(self.scorers.parameters(), CLIP)
        # A run by time does not know its steps: those of a run as fast as it was so far.
        steps = self.length.steps or (now.step / done if done else math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * self.config.factor(now.step, steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # Processes end a run together: they go by the time of the slowest.
        value = self._over_processes(learned.mean().item(), "sum")
        now.step += 1
        now.tokens += batch["input_ids"].numel()
        now.losses.append(value)
        now.seconds += self._over_processes(time.perf_counter() - start, "max")
        self.inside_step = False
        return value

    @contextmanager
    def _shared(self) -> Iterator[mms.SequenceParallel | None]:
        """Sequences are shared in a step alone: what is measured is measured of all heads."""
        if not self.share_sequences:
            yield None
            return
        with mms.sequence_parallel(self.model) as sequence:
            yield sequence

    def _over_processes(self, value: float, how: str) -> float:
        """The sum or the largest of a number that each process has."""
        if not self.share_sequences:
            return value
        whole = torch.tensor(value, dtype=torch.float64, device=self.device)
        kinds = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
        dist.all_reduce(whole, kinds[how])
        return whole.item()

    def anyone(self, here: bool) -> bool:
        """Whether something is so in any process; all must ask."""
        return self._over_processes(float(here), "max") > 0

    @property
    def rate(self) -> float:
        """The learning rate at its height."""
        return self.config.scorer_lr or self.config.lr

    def _dropped(self, scores: Scores, mass: Tensor) -> Tensor:
        return dropped_mass(scores.values, mass, scores.plan, self.goal.temperature)

    def figures(self, batches: Sequence[Batch], tiles: int = 64) -> dict[str, dict[str, float]]:
        """By layer, mean over batches: divergence, kept mass and overlap with a perfect choice."""
        served, sums = attention_layers(self.model), dict[str, dict[str, list[float]]]()
        for batch in batches:
            found = layer_figures(self.model, batch, self.run, tiles=tiles)
            for name, own in found.items():
                if served[name].known_mode()[0] != "sparse":
                    continue
                for figure in ("divergence", "kept", "overlap"):
                    sums.setdefault(name, {}).setdefault(figure, []).append(own[figure])
        return {
            name: {figure: sum(x) / len(x) for figure, x in own.items()}
            for name, own in sums.items()
        }

    def fit(self, after: Callable[[float], None] | None = None) -> None:
        """Train to the end of the run.

        Args:
            after: called after each step with its loss.
        """
        while self.done < 1:
            loss = self.step()
            if after is not None:
                after(loss)

    def state(self) -> dict[str, Any]:
        """All that a run needs to go on."""
        return {
            "progress": vars(self.progress) | {"losses": list(self.progress.losses)},
            "scorers": self.scorers.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rows": self.rows.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.progress = Progress(**state["progress"])
        self.scorers.load_state_dict(state["scorers"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rows.restore(state["rows"])


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a state such that a run that is cut off leaves the one before."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def slope(losses: Sequence[float]) -> float | None:
    """How much a loss falls when a run doubles: a line through it over the logarithm of the step,
    through the second half of the steps; None of less than eight."""
    half = losses[len(losses) // 2 :]
    if len(half) < 4:
        return None
    steps = torch.arange(len(losses) - len(half) + 1, len(losses) + 1, dtype=torch.float64).log()
    values = torch.tensor(half, dtype=torch.float64)
    centred = steps - steps.mean()
    fall = -(centred @ (values - values.mean())) / (centred @ centred)
    return fall.item() * math.log(2)

"""AdamW with a rate per part, a warm-up and a cosine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, warm-up, then a cosine down to `final` of the learning rate."""

    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: int = 50
    """Steps until the learning rate is full."""
    final: float = 0.01
    scorer_lr: float | None = None
    """Learning rate of the scorers, `lr` if None."""
    projector_lr: float | None = None
    """Learning rate of the projector, which starts from scratch; `lr` if None."""

    def __post_init__(self) -> None:
        for name in ("lr", "scorer_lr", "projector_lr"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {self.warmup}")

    def factor(self, step: int, steps: float) -> float:
        """Of the learning rate in a step, from 0 on, of so many."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min((step - self.warmup) / max(steps - self.warmup, 1), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


def optimize(
    part: OptimizerConfig, model: nn.Module, names: Sequence[str], steps: int
) -> dict[str, Any]:
    """Optimizer and schedule over so many steps for a model's named parts, in Lightning's form."""
    rates = {
        "scorers": part.scorer_lr,
        "projector": part.projector_lr,
        "audio_projector": part.projector_lr,
    }
    groups: list[dict[str, Any]] = []
    for name in names:
        own = [p for p in getattr(model, name).parameters() if p.requires_grad]
        speed = rates.get(name) or part.lr
        # Matrices decay; norms, biases and whatever ranks keys do not.
        decays = [p for p in own if p.ndim > 1 and name != "scorers"]
        rest = [p for p in own if p.ndim < 2 or name == "scorers"]
        groups.append({"params": decays, "weight_decay": part.weight_decay, "lr": speed})
        groups.append({"params": rest, "weight_decay": 0.0, "lr": speed})
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(f"freeze must leave something to train, got all of {tuple(names)}")
    optimizer = torch.optim.AdamW(groups, lr=part.lr, betas=part.betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: part.factor(step, steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

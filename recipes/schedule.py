"""The optimizer that every recipe uses: AdamW, warm-up, cosine."""

import math
from typing import Any

import torch

from mm_sparse.recipes.parts import OptimizerPart


def adamw(groups: Any, part: OptimizerPart, steps: int) -> dict[str, Any]:
    """What `configure_optimizers` returns for a run of so many steps."""
    optimizer = torch.optim.AdamW(groups, lr=part.lr, betas=part.betas)

    def rate(step: int) -> float:
        if step < part.warmup:
            return (step + 1) / part.warmup
        done = min((step - part.warmup) / max(steps - part.warmup, 1), 1.0)
        return part.final + (1 - part.final) * (1 + math.cos(math.pi * done)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

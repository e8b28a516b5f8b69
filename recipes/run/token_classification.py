"""How a tower learns to classify what each of its tokens shows, before a recipe uses it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mm_sparse.recipes.data import IGNORED


def train_token_classifier(
    tower: nn.Module,
    classify: Callable[[range], tuple[Tensor, Tensor]],
    *,
    steps: int,
    batch: int,
    lr: float,
    weight_decay: float,
) -> float:
    """Train the tower in place; returns the share of tokens of the last batch classified right.

    Args:
        classify: for the numbers of samples, logits (B, N, classes) of their tokens and
            labels (B, N); tokens labelled `IGNORED` do not count.
    """
    optimizer = torch.optim.AdamW(tower.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    right = 0.0
    tower.train()
    for step in range(steps):
        logits, labels = classify(range(step * batch, (step + 1) * batch))
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        known = labels != IGNORED
        right = (logits.argmax(-1) == labels)[known].float().mean().item()
        if (step + 1) % 50 == 0:
            print(f"  tower: step {step + 1} of {steps}, {right:.0%} of tokens right", flush=True)
    return right

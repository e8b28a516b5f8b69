"""Teach scorers where a model's attention goes.

B batch, K KV heads, T tiles, U units
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mm_sparse import unit_mass
from mm_sparse.integrations.call import Call
from mm_sparse.integrations.patching import layers, watch
from mm_sparse.layout.plan import Plan
from mm_sparse.scorers.pooled import Scorer, Scores

TINY = 1e-6


def scorer_loss(scores: Scores, mass: Tensor) -> Tensor:
    """`divergence` of what a scorer predicted, every tile counting alike."""
    return divergence(scores.values, mass, scores.plan)


def divergence(values: Tensor, mass: Tensor, plan: Plan, *, weighted: bool = False) -> Tensor:
    """KL(true || predicted) over the units that are a matter of choice, mean over heads and tiles.

    A tile chooses among units that it sees and that are not kept anyway (`plan.always`): mass on
    sinks and window would drown the rest. Both distributions are renormalised over those.

    Args:
        values: (..., B, K, T, U) scores.
        mass: the same shape, true share of attention, as `mm_sparse.unit_mass` gives it.
        weighted: count a tile by its mass on those units.
    """
    if mass.shape != values.shape:
        raise ValueError(
            f"mass must be {tuple(values.shape)} as the scores are, got {tuple(mass.shape)}"
        )
    open_units = (plan.visible & ~plan.always)[:, None]
    mass = mass.detach().float() * open_units
    total = mass.sum(-1, keepdim=True)
    chosen = (total[..., 0] > TINY) & (open_units.sum(-1) > 1)
    target = mass / total.clamp(min=TINY)
    # A large negative number, not -inf: no gradient may become NaN.
    predicted = values.float().masked_fill(~open_units, -1e9).log_softmax(-1)
    gap = torch.special.xlogy(target, target) - target * predicted
    loss = gap.masked_fill(~open_units, 0).sum(-1) * chosen
    if weighted:
        return (loss * total[..., 0]).mean()
    return loss.sum() / chosen.sum().clamp(min=1)


def dropped_mass(
    values: Tensor, mass: Tensor, plan: Plan, temperature: float, budget: Tensor | None = None
) -> Tensor:
    """Share of attention that a soft choice of the best units drops, mean over heads and tiles.

    Args:
        values, mass: (..., B, K, T, U), as for `divergence`.
        temperature: of `soft_choice`.
        budget: (..., B, K or 1, T) tokens, if not the plan's for the best.
    """
    open_units = (plan.visible & ~plan.always)[:, None]
    mass = mass.detach().float() * open_units
    choice = open_units[:, 0].sum(-1) > 1
    kept = soft_choice(values, plan, temperature, budget)
    return ((mass * (1 - kept)).sum(-1) * choice[:, None]).mean()


def soft_choice(
    values: Tensor, plan: Plan, temperature: float, budget: Tensor | None = None
) -> Tensor:
    """How much of each open unit is kept, (..., B, K, T, U) in [0, 1].

    A unit is kept by the sigmoid of its distance to the score of the last unit that the budget of
    the best holds, over `temperature`. That threshold moves with the scores such that the number of
    kept units stays: what counts is who is above it (as in differentiable top-k operators).

    Args:
        temperature: in units of the scores, which are logarithms of shares.
        budget: as for `dropped_mass`.
    """
    open_units = (plan.visible & ~plan.always)[:, None]
    values = values.float().masked_fill(~open_units, -1e9)
    always = (plan.always * plan.units[:, None, :, 1]).sum(-1)
    budget = plan.best.head_budget if budget is None else budget
    left = (budget - always[:, None]).clamp(min=0) // plan.unit  # units
    most = open_units[:, 0].sum(-1) - 1
    left = left.minimum(most[:, None]).clamp(min=1)[..., None].expand(*values.shape[:-1], 1)
    with torch.no_grad():
        ranked = values.sort(-1, descending=True).values
        behind = left.clamp(max=values.shape[-1] - 1)
        threshold = (ranked.gather(-1, left - 1) + ranked.gather(-1, behind)) / 2
        kept = torch.sigmoid((values - threshold) / temperature)
        slope = kept * (1 - kept)
        slope = slope / slope.sum(-1, keepdim=True).clamp(min=TINY)
    drift = (slope * values).sum(-1, keepdim=True)
    return torch.sigmoid((values - threshold - (drift - drift.detach())) / temperature)


@dataclass
class Lessons:
    """Losses of the layers of a forward pass, by name of the layer."""

    losses: dict[str, Tensor] = field(default_factory=dict)

    def mean(self) -> Tensor:
        """Mean over layers; zero where no layer with a scorer ran sparse."""
        if not self.losses:
            return torch.zeros(())
        return torch.stack(list(self.losses.values())).mean()


@contextmanager
def lessons(
    model: nn.Module, loss: Callable[[Scores, Tensor], Tensor] = scorer_loss
) -> Iterator[Lessons]:
    """Gather the `loss` of every layer that runs inside; gradients reach the scorers only.

    The truth is the full attention of each layer's own queries and keys, computed tile by tile.
    """
    found, served = Lessons(), layers(model)

    def learn(call: Call) -> None:
        scorer = served[call.name].scorer
        if scorer is None or call.scores is None or next(scorer.parameters(), None) is None:
            return
        found.losses[call.name] = _lesson(call, call.scores.plan, scorer, loss)

    with watch(model, learn):
        yield found


def _lesson(
    call: Call, plan: Plan, scorer: Scorer, loss: Callable[[Scores, Tensor], Tensor]
) -> Tensor:
    q, k = call.q.detach(), call.k.detach()
    with torch.no_grad():
        mass = unit_mass(q, k, plan, call.scale)
    # The model itself may run without gradients.
    with torch.enable_grad():
        own = scorer(
            q,
            k,
            layout=plan.layout,
            config=plan.config,
            query_offset=plan.query_offset,
            scale=call.scale,
        )
        return loss(own, mass)

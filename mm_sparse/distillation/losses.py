"""Teach scorers where a model's attention goes.

B batch, K KV heads, T tiles, U units
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mm_sparse.integrations import (
    AttentionCall,
    State,
    attention_layers,
    capture_attention,
    state_of,
)
from mm_sparse.layout import Plan
from mm_sparse.scorers import Scorer, unit_mass
from mm_sparse.selection import Scores

TINY = 1e-6


def scorer_loss(scores: Scores, mass: Tensor) -> Tensor:
    """`attention_kl` of what a scorer predicted, every tile counting alike."""
    return attention_kl(scores.values, mass, scores.plan)


def attention_kl(values: Tensor, mass: Tensor, plan: Plan, *, weighted: bool = False) -> Tensor:
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


@dataclass
class DistillationLosses:
    """Losses of the layers of a forward pass, by name of the layer."""

    losses: dict[str, Tensor] = field(default_factory=dict)

    def mean(self) -> Tensor:
        """Mean over layers; zero where no layer with a scorer ran sparse."""
        if not self.losses:
            return torch.zeros(())
        return torch.stack(list(self.losses.values())).mean()


@contextmanager
def distillation_losses(
    model: nn.Module, loss: Callable[[Scores, Tensor], Tensor] = scorer_loss
) -> Iterator[DistillationLosses]:
    """Gather the `loss` of every layer that runs inside; gradients reach the scorers only.

    The truth is the full attention of each layer's own queries and keys, computed tile by tile.
    Each layer counts once, also under gradient checkpointing, and the losses may be used behind the
    block. In several processes somebody must average what scorers learn: DDP, where they were made
    a submodule before (`register_scorers`), or `average_scorer_gradients`; else a warning says so.
    """
    _warn_of_drift(state_of(model))
    gathered = DistillationLosses()
    # A model that wraps the sparsified one has other names for its layers.
    layers = {layer.name: layer for layer in attention_layers(model).values()}

    def learn(call: AttentionCall) -> None:
        scorer = layers[call.name].scorer
        if scorer is None or call.scores is None or next(scorer.parameters(), None) is None:
            return
        gathered.losses[call.name] = _layer_loss(call, call.scores.plan, scorer, loss)

    with capture_attention(model, learn):
        yield gathered


def _warn_of_drift(state: State) -> None:
    dist = torch.distributed
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not several or state.owned or state.averaged:
        return
    if state.distilled == 1:
        # Not in the first step: gradients are averaged behind it.
        warnings.warn(
            f"the scorers of this {state.root} learn in {dist.get_world_size()} processes and "
            "nothing averages them: call `mms.register_scorers(model)` before DDP, or "
            "`mms.average_scorer_gradients(model)` between backward and step",
            stacklevel=4,
        )
    state.distilled += 1


def _layer_loss(
    call: AttentionCall, plan: Plan, scorer: Scorer, loss: Callable[[Scores, Tensor], Tensor]
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

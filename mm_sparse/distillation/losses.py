"""Teach scorers where a model's attention goes.

B batch, K KV heads, T tiles, U units
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mm_sparse.distillation.divergence import scorer_loss
from mm_sparse.distillation.layer_loss import layer_loss
from mm_sparse.distillation.tile_draw import TileDraw, draw_tiles
from mm_sparse.integrations import (
    AttentionCall,
    HeadPart,
    SparseLayer,
    State,
    attention_layers,
    capture_attention,
    state_of,
)
from mm_sparse.layout import Plan
from mm_sparse.scorers import Scorer
from mm_sparse.selection import Scores

TILES = 32
"""Drawn in each layer and row of a batch, unless one says otherwise."""


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
    model: nn.Module,
    loss: Callable[[Scores, Tensor], Tensor] = scorer_loss,
    *,
    tiles: int | None = TILES,
    every: int = 1,
    generator: torch.Generator | None = None,
    backward_weight: float | None = None,
) -> Iterator[DistillationLosses]:
    """Gather the `loss` of every layer that runs inside; gradients reach the scorers only.

    The truth is the full attention of each layer's own queries and keys, for tiles drawn at random.
    The gradients are computed along with a loss, so that all a loss keeps is one gradient for each
    parameter of its scorer. Each layer counts once, also under gradient checkpointing, and the
    losses may be used behind the block. In several processes somebody must average what scorers
    learn: DDP, where they were made a submodule before (`register_scorers`), or
    `average_scorer_gradients`; else a warning says so. Under `sequence_parallel` a loss is
    the share of a rank's heads, in towers an even one, and `SequenceParallel.sum_gradients` adds up
    what they learn.

    Inside `override_config(model, backend="dense")` layers learn from a dense run.

    Args:
        loss: of scores (B, K, T, U) and true mass of the same shape, a mean over tiles. Scores
            are those of a plan of the drawn tiles.
        tiles: drawn in each layer and row of a batch, among those that have a choice; the mean of
            the losses is that over all tiles, on average over draws. None takes all.
        every: layers of which one learns. The others take their turn in the next blocks, so that
            each learns in every `every`-th.
        generator: draws the tiles. None: one is seeded by torch's on entry, so that what the model
            draws inside (dropout) is computed again alike by checkpoints.
        backward_weight: take each loss back where it arises, times this number: gradients are in
            `grad` of the scorers behind the block, and no more than those of one layer are held
            twice. For scorers that learn alone; the losses are numbers then.

    Raises:
        ValueError: `tiles` or `every` below 1.

    Example:
        >>> with mms.distillation_losses(model) as scorer_losses:
        ...     loss = model(ids, labels=ids).loss
        >>> (loss + 0.1 * scorer_losses.mean()).backward()
    """
    for name, value in (("tiles", tiles), ("every", every)):
        right = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not right and not (name == "tiles" and value is None):
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    state = state_of(model)
    _warn_of_drift(state)
    gathered = DistillationLosses()
    # A model that wraps the sparsified one has other names for its layers.
    layers = {layer.name: layer for layer in attention_layers(model).values()}
    learners = [name for name, layer in layers.items() if _learns(layer.scorer)]
    turn, state.shared.turn = state.shared.turn, state.shared.turn + 1
    waiting = {name for number, name in enumerate(learners) if (number + turn) % every}
    splits = (layer.head_split for layer in layers.values() if layer.head_split is not None)
    shared = next(splits, None)
    draws = _Draws(generator, tiles, shared)

    def learn(call: AttentionCall) -> None:
        layer = layers[call.name]
        scorer, split = layer.scorer, layer.head_split
        if scorer is None or not _learns(scorer) or call.name in waiting:
            return
        if not call.sparse and not _dense_for_now(call, layer):
            return
        plan = call.plan()
        draw = draws.draw(plan)
        if split is not None:
            scorer = split.scorer_of(scorer)
        value = layer_loss(call.q, call.k, plan, draw, scorer, call.scale, loss, split)
        if shared is not None and split is None:
            # Every rank has all heads of a tower. The model itself may run without gradients.
            with torch.enable_grad():
                value = value / shared.size
        if backward_weight is not None and value.requires_grad:
            value.backward(torch.full_like(value, backward_weight))
            value = value.detach()
        gathered.losses[call.name] = value

    with capture_attention(model, learn, scores=False):
        yield gathered


def _learns(scorer: Scorer | None) -> bool:
    return scorer is not None and next(scorer.parameters(), None) is not None


def _dense_for_now(call: AttentionCall, layer: SparseLayer) -> bool:
    """Whether a call is dense only because `backend` says so."""
    if call.layout is None or call.config is None:
        return False
    return layer.known_mode(replace(call.config, backend="auto"))[0] == "sparse"


def _warn_of_drift(state: State) -> None:
    dist = torch.distributed
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not several or state.shared.owned or state.shared.averaged:
        return
    if state.shared.distilled == 1:
        # Not in the first step: gradients are averaged behind it.
        warnings.warn(
            f"the scorers of this {state.root} learn in {dist.get_world_size()} processes and "
            "nothing averages them: call `mms.register_scorers(model)` before DDP, or "
            "`mms.average_scorer_gradients(model)` between backward and step",
            stacklevel=4,
        )
    state.shared.distilled += 1


class _Draws:
    """Draws tiles of calls by random numbers of its own."""

    def __init__(
        self, generator: torch.Generator | None, tiles: int | None, split: HeadPart | None
    ) -> None:
        self.generator, self.tiles = generator, tiles
        self._seed = (
            int(torch.randint(1 << 62, (), device="cpu")) if tiles and generator is None else 0
        )

        if split is not None:
            # Ranks with heads of the same layer draw the same tiles.
            self._seed = split.of_first_rank(self._seed)

    def draw(self, plan: Plan) -> TileDraw:
        """Tiles of a plan."""
        device = plan.units.device
        if self.tiles is not None and self.generator is None:
            self.generator = torch.Generator(device).manual_seed(self._seed)
        return draw_tiles(plan, self.tiles, self.generator)

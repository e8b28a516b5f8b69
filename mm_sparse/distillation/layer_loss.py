"""The loss of one layer's scorer and its gradients, a block of tiles at a time.

The loss is a number, so the gradients of the scorer's parameters are known as soon as it is: they
are computed then and there, and all that is kept until the backward pass is one gradient for each
parameter. Nothing of size T x U outlives the call.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim, T tiles, U units,
S query pools of a tile, C parts of a unit
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm_sparse.distillation.divergence import kl_of_tiles, scorer_loss
from mm_sparse.distillation.tile_draw import TileDraw
from mm_sparse.integrations import HeadPart
from mm_sparse.layout import Plan
from mm_sparse.scorers import Descriptors, Scorer, described_units, unit_mass
from mm_sparse.selection import Scores

Loss = Callable[[Scores, Tensor], Tensor]
# Logits of query pools in a block of tiles whose scores have a graph.
BLOCK_ELEMENTS = 1 << 24
# Entries of the true mass of tiles that one call of `unit_mass` finds: a GPU wants many tiles.
MASS_ELEMENTS = 1 << 24


def layer_loss(
    q: Tensor, k: Tensor, plan: Plan, draw: TileDraw, scorer: Scorer, scale: float,
    loss: Loss = scorer_loss, split: HeadPart | None = None,
) -> Tensor:  # fmt: skip
    """Loss of a scorer against true attention; a scalar whose gradients reach the scorer alone.

    `scorer_loss` is the mean over the tiles with a choice that those drawn stand for. Another loss
    is given the scores of all drawn tiles at once, as those of a plan of these tiles.

    Args:
        q: (B, H, N, D). k: (B, K, M, D).
        plan: of all tiles.
        draw: those that count.
        scale: factor on q.k.
        loss: of scores (B, K, t, U) and true mass of the same shape.
        split: of which heads q and k are, where others are on other ranks; losses of all ranks
            then add up to that of all heads.
    """
    q, k = q.detach(), k.detach()
    # Nothing has a graph in inference mode.
    learns = not torch.is_inference_mode_enabled()
    weights = [p for p in scorer.parameters() if p.requires_grad and learns]
    with _uncached_autocast(q.device.type), torch.set_grad_enabled(bool(weights)):
        scored = _scored(q, k, plan, draw, scorer, scale)
        if loss is scorer_loss:
            value = _mean_kl(q, k, draw, scored, scale, split)
        else:
            share = 1.0 if split is None else 1 / split.size
            value = _loss_of_all(q, k, draw, scored, scale, loss, share)
        grads = scored.gradients(weights)
    # The model itself may run without gradients.
    with torch.enable_grad():
        return _KnownGradients.apply(value, *weights, *grads)


class _KnownGradients(torch.autograd.Function):
    """A number and its gradients for some weights, which are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *weights_and_grads: Tensor | None) -> Tensor:
        ctx.save_for_backward(*weights_and_grads[len(weights_and_grads) // 2 :])
        return value.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = ctx.saved_tensors
        return (None, *(None if g is None else g * grad for g in grads), *(None for _ in grads))


class _ScoredTiles:
    """Scores of tiles, a block at a time, and gradients of what they are made of.

    Args:
        rows: what tiles have of their own, tiles along dimension 2; has a graph.
        shared: what all tiles share, such as descriptors of units; has a graph.
        score: (B, K, t, U) of rows of a block, of `shared`, of the block and of its plan.
        step: tiles of a block.
    """

    def __init__(
        self, rows: Tensor, shared: Sequence[Tensor | None],
        score: Callable[[Tensor, list[Any], slice, Plan], Tensor], step: int,
    ) -> None:  # fmt: skip
        self.rows, self.shared, self.step = rows, list(shared), max(step, 1)
        self._score, self._row = score, rows
        self._leaves: list[Any] = [None if x is None else _leaf(x) for x in shared]
        self._sums: list[Tensor | None] = [None for _ in shared]
        self._row_grads: list[Tensor] = []

    def block(self, part: slice, plan: Plan) -> Tensor:
        """(B, K, t, U) of the tiles of a block, with a graph down to what they are made of."""
        self._row = _leaf(self.rows[:, :, part])
        return self._score(self._row, self._leaves, part, plan)

    def take_back(self, output: Tensor, grad: Tensor | None = None) -> None:
        """Add the gradients of a function of the block that was scored last."""
        if not output.requires_grad:
            return
        leaves = [self._row, *self._leaves]
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        with _no_autocast(output.device.type):
            found = iter(torch.autograd.grad(output, wanted, grad, allow_unused=True))
        row, *shared = (next(found) if x is not None and x.requires_grad else None for x in leaves)
        self._row_grads.append(torch.zeros_like(self._row) if row is None else row)
        for i, more in enumerate(shared):
            # Of many blocks: the sum of numbers of 16 bits must not be one of 16 bits.
            wide = None if more is None else more.to(torch.promote_types(more.dtype, torch.float32))
            so_far = self._sums[i]
            self._sums[i] = wide if so_far is None else so_far if wide is None else so_far + wide

    def gradients(self, weights: Sequence[Tensor]) -> list[Tensor | None]:
        """Of weights, once all blocks were taken back; frees the graph."""
        own = torch.cat(self._row_grads, 2) if self._row_grads else None
        pairs = [
            (x, grad.to(x.dtype))
            for x, grad in zip((self.rows, *self.shared), (own, *self._sums), strict=True)
            if x is not None and x.requires_grad and grad is not None
        ]
        if not pairs:
            return [None for _ in weights]
        outputs, grads = zip(*pairs, strict=True)
        with _no_autocast(self.rows.device.type):
            return list(torch.autograd.grad(outputs, weights, grads, allow_unused=True))

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply what was taken back so far."""
        self._row_grads = [g * factor.to(g.dtype) for g in self._row_grads]
        self._sums = [None if g is None else g * factor for g in self._sums]


def _scored(
    q: Tensor, k: Tensor, plan: Plan, draw: TileDraw, scorer: Scorer, scale: float
) -> _ScoredTiles:
    if scorer.describes:
        made = scorer.described(q, k, draw.plan, scale)
        tile, _, exists, bias, parts = made
        unit = described_units(made, draw.plan)

        def score(rows: Tensor, shared: list[Any], part: slice, own: Plan) -> Tensor:
            made = Descriptors(rows, shared[0], exists[:, part], *shared[1:])
            return scorer.score_described(made, own)

        per_tile = tile[:, :, :1, :, 0].numel() * unit.shape[2]
        per_tile *= 1 if parts is None else parts.shape[3]
        return _ScoredTiles(tile, (unit, bias, parts), score, BLOCK_ELEMENTS // max(per_tile, 1))
    # A scorer that writes `score` may look at all tiles at once.
    values = scorer(
        q, k, layout=plan.layout, config=plan.config, query_offset=plan.query_offset, scale=scale
    ).values
    if draw.index is not None:
        index = draw.index[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3])
        values = values.gather(2, index)
    per_tile = values[:, :, :1].numel()
    step = BLOCK_ELEMENTS // max(per_tile, 1)
    return _ScoredTiles(values, (), lambda rows, *_: rows, step)


def _mean_kl(
    q: Tensor, k: Tensor, draw: TileDraw, scored: _ScoredTiles, scale: float,
    split: HeadPart | None,
) -> Tensor:  # fmt: skip
    """`kl_of_tiles`, mean over the tiles that the drawn ones stand for."""
    total = torch.zeros((), device=q.device)
    count = torch.zeros((), device=q.device)
    for start, some, mass in _masses(q, k, draw.plan, scale):
        for part, plan in _blocks(some, scored.step):
            values = scored.block(slice(start + part.start, start + part.stop), plan)
            found = kl_of_tiles(values, mass[:, :, part], plan)
            weight = 1 if draw.weight is None else draw.weight[:, None, None]
            loss = (found.divergence * weight).sum()
            scored.take_back(loss)
            total += loss.detach()
            count += (found.chosen * weight).sum()
    if split is not None:
        count = split.total(count)
    count = torch.where(count > 0, count, 1)
    scored.scale_gradients(1 / count)
    return total / count


def _loss_of_all(
    q: Tensor, k: Tensor, draw: TileDraw, scored: _ScoredTiles, scale: float, loss: Loss,
    share: float,
) -> Tensor:  # fmt: skip
    """A loss that wants all tiles at once; their scores are made again for the gradients.

    Args:
        share: of the loss of all heads that these make.
    """
    values, masses = [], []
    for start, some, mass in _masses(q, k, draw.plan, scale):
        masses.append(mass)
        with torch.no_grad():
            for part, plan in _blocks(some, scored.step):
                own = slice(start + part.start, start + part.stop)
                values.append(scored.block(own, plan))
    if not values:
        return torch.zeros((), device=q.device)
    given = torch.cat(values, 2).requires_grad_(torch.is_grad_enabled())
    value = loss(Scores(given, draw.plan), torch.cat(masses, 2)) * share
    if value.requires_grad:
        grad = torch.autograd.grad(value, given)[0]
        for part, plan in _blocks(draw.plan, scored.step):
            scored.take_back(scored.block(part, plan), grad[:, :, part])
    return value.detach()


def _masses(q: Tensor, k: Tensor, plan: Plan, scale: float) -> Iterator[tuple[int, Plan, Tensor]]:
    """Number of the first tile, plan and true mass (B, K, t, U) of runs of tiles."""
    per_tile = q.shape[0] * k.shape[1] * plan.units.shape[1]
    for part, some in _blocks(plan, max(MASS_ELEMENTS // max(per_tile, 1), 1)):
        with torch.no_grad():
            mass = unit_mass(q, k, some, scale)
        yield part.start, some, mass


def _blocks(plan: Plan, step: int) -> Iterator[tuple[slice, Plan]]:
    """Runs of at most `step` tiles and their plans."""
    num_tiles = plan.tiles.shape[1]
    if num_tiles <= step:
        if num_tiles:
            yield slice(0, num_tiles), plan
        return
    for start in range(0, num_tiles, step):
        part = slice(start, min(start + step, num_tiles))
        yield part, plan.select_tiles(part)


def _leaf(x: Tensor) -> Tensor:
    """The same numbers as the beginning of another graph."""
    return x.detach().requires_grad_(x.requires_grad and torch.is_grad_enabled())


def _uncached_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast as it is, without its cache: that would hold what a block was made of."""
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """Gradients have the dtype of what they are gradients of."""
    return torch.autocast(device, enabled=False) if device in ("cpu", "cuda") else nullcontext()

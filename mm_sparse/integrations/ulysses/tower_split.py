"""Images and clips of a batch, shared out between ranks for the tower that encodes them.

Every rank encodes some of them, and all-gathers what the others have made. Nothing in a tower goes
from one image, or clip, to another.

P ranks, I images or clips
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map_only

from mm_sparse.integrations.hf.attention import HFLayer
from mm_sparse.integrations.ulysses.exchange import Group

GRID = "grid_thw"
"""Argument of a tower that lays all patches into one row: frames, height, width of each image."""
BATCHED = ("pixel_values", "input_features", "input_values")
"""First arguments of towers of which every row is an image or a clip."""


class Share(NamedTuple):
    """What each rank encodes of one call."""

    first: tuple[int, ...]
    """(P + 1,) images before those of each rank, and all of them."""
    sizes: tuple[int, ...]
    """(P,) patches, or rows, of each rank: those of a first image where it has none."""
    own: int
    """Patches, or rows, that this rank encodes."""


@cache
def kind_of_tower(cls: type) -> str:
    """The argument by which the images of a tower's class are told apart; empty if it is unknown.

    A tower whose forward has the grids of images lays their patches into one row.
    """
    names = list(inspect.signature(cls.forward).parameters)[1:]
    if GRID in names:
        return GRID
    # Sizes or lengths say that a row is not an image or a clip.
    cut = any(name.endswith(("_sizes", "_lens")) for name in names)
    return names[0] if names and names[0] in BATCHED and not cut else ""


class TowerSplit:
    """Hooks on a tower that let each rank encode some images, or clips, of a call.

    A call of one image, calls in which scorers of the tower learn, and those whose patches do not
    lie in rows are made whole.

    Args:
        tower: a model of transformers without the decoder.
        layers: its attention layers.
        group: of P ranks, which all give the tower the same input.
    """

    def __init__(self, tower: nn.Module, layers: Sequence[HFLayer], group: Group) -> None:
        self.tower, self.layers, self.group = tower, layers, group
        self.kind = kind_of_tower(type(tower))
        self._names = list(inspect.signature(type(tower).forward).parameters)[1:]
        self._share: Share | None = None

    def attach(self) -> list[Any]:
        """Set the hooks; returns their handles."""
        return [
            # Before those that look at what is encoded.
            self.tower.register_forward_pre_hook(self._take, with_kwargs=True, prepend=True),
            self.tower.register_forward_hook(self._gather),
        ]

    def _take(self, tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: what this rank encodes."""
        self._share = None
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        told = given.get(self.kind)
        if not isinstance(told, Tensor) or len(told) < 2 or self._learns():
            return args, kwargs
        images = told.prod(-1).tolist() if self.kind == GRID else [1] * len(told)
        if not _lies_in_rows(given, self.kind, sum(images)):
            return args, kwargs
        share = self._share = shared_out(images, self.group.size(), self.group.rank())
        rank = self.group.rank()
        start, end = share.first[rank], share.first[rank + 1]
        if start == end:
            start, end = 0, 1
        rows = slice(sum(images[:start]), sum(images[:end]))
        total, count = sum(images), len(images)
        cut = {
            name: x[start:end] if name == GRID and isinstance(x, Tensor)
            else _cut(x, rows, total, count) for name, x in given.items()
        }  # fmt: skip
        return (), cut

    def _learns(self) -> bool:
        """Whether scorers of the tower may learn in this call: from all images at once."""
        watched = any(layer.shared.settings.watchers for layer in self.layers)
        return watched and any(layer.scorer is not None for layer in self.layers)

    def _gather(self, tower: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook: what all ranks have encoded."""
        share, self._share = self._share, None
        if share is None:
            return output

        given = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        axes = [self._axis(x, share) for x in given]
        counts = self._counts([x.shape[axis] for x, axis in zip(given, axes, strict=True)], given)
        empty = [a == b for a, b in pairwise(share.first)]
        found = iter(zip(axes, counts, strict=True))

        def gather(x: Tensor) -> Tensor:
            axis, rows = next(found)
            whole = _Gather.apply(x.transpose(0, axis), rows, empty, self.group)  # pyright: ignore
            return whole.transpose(0, axis)  # type: ignore[union-attr]

        return tree_map_only(Tensor, gather, output)

    def _axis(self, x: Tensor, share: Share) -> int:
        """Where an output has its rows: some towers give back patches as a batch of one."""
        alone = self.kind == GRID and x.dim() > 2 and x.shape[0] == 1 and share.own > 1
        if not x.dim() or (alone and x.dim() > 3):
            raise ValueError(
                f"{type(self.tower).__name__} must give back something for each of its "
                f"{share.own} patches or rows, got a tensor of shape {tuple(x.shape)}"
            )
        return int(alone)

    def _counts(self, own: list[int], given: list[Tensor]) -> list[list[int]]:
        """Rows of each output on each rank: a tower may drop padding, or mark the ends of lines."""
        if not own:
            return []
        sent = torch.tensor(own, device=given[0].device)
        parts = sent.new_empty(self.group.size() * len(own))
        dist.all_gather_into_tensor(parts, sent, group=self.group)
        return parts.view(-1, len(own)).T.tolist()


def _lies_in_rows(given: dict[str, Any], kind: str, total: int) -> bool:
    """Whether what a tower is given has a row for each patch, image or clip."""
    if kind != GRID:
        return True
    first = next((x for name, x in given.items() if name != GRID and isinstance(x, Tensor)), None)
    return first is not None and first.dim() > 0 and first.shape[0] == total


def _cut(x: Any, rows: slice, total: int, count: int) -> Any:
    """The rows of a rank, of what has one for each patch or image; else as it is."""
    if not isinstance(x, Tensor) or not x.dim() or x.shape[0] not in (total, count):
        return x
    return x[rows]


def shared_out(images: Sequence[int], ranks: int, rank: int) -> Share:
    """Runs of images of about as many patches for each rank, in their order.

    Args:
        images: patches of each.
        ranks: P.
        rank: whose part `own` is.
    """
    ends = list(accumulate(images, initial=0))
    first = [0]
    for number in range(1, ranks):
        goal = ends[-1] * number / ranks
        nearest = min(range(first[-1], len(ends)), key=lambda at: abs(ends[at] - goal))
        first.append(nearest)
    first.append(len(images))
    sizes = [ends[b] - ends[a] or images[0] for a, b in pairwise(first)]
    return Share(tuple(first), tuple(sizes), sizes[rank])


class _Gather(torch.autograd.Function):
    """Rows of all ranks behind each other; of gradients, the sum over ranks of the own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], empty: list[bool], group: Group) -> Tensor:
        ctx.rows, ctx.empty, ctx.group = rows, empty, group
        most = max(rows)
        sent = x.new_zeros(most, *x.shape[1:])
        sent[: len(x)] = x
        parts = x.new_empty(len(rows) * most, *x.shape[1:])
        dist.all_gather_into_tensor(parts, sent, group=group)
        kept = [
            part[:count] for part, count, none in
            zip(parts.split(most), rows, empty, strict=True) if not none
        ]  # fmt: skip
        return torch.cat(kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        rank = ctx.group.rank()
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        counts = [0 if none else count for count, none in zip(ctx.rows, ctx.empty, strict=True)]
        start = sum(counts[:rank])
        own = grad[start : start + counts[rank]]
        if ctx.empty[rank]:
            own = grad.new_zeros(ctx.rows[rank], *grad.shape[1:])
        return own, None, None, None


def find_towers(model: nn.Module, layers: dict[str, HFLayer], decoder: nn.Module) -> list[Any]:
    """(tower, its layers) of outermost models of transformers beside the decoder that are known.

    Args:
        layers: attention layers of the whole model.
        decoder: a part of the model that no tower may hold.
    """
    from transformers import PreTrainedModel

    found: list[tuple[nn.Module, list[HFLayer]]] = []
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or not kind_of_tower(type(module)):
            continue
        if any(part is decoder for part in module.modules()):
            continue
        if any(any(part is module for part in tower.modules()) for tower, _ in found):
            continue
        inside = {id(part) for part in module.modules()}
        own = [layer for layer in layers.values() if id(layer.module) in inside]
        if own:
            found.append((module, own))
    return found

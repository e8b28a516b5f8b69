"""A loader that goes on inside an epoch when a run is resumed, and batches of like length."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from mm_sparse.recipes.data.samples import Samples


class ResumableLoader(DataLoader[Any]):
    """Lightning keeps its state in checkpoints: batches given out, and where the order came from.

    Batches that the broken run has had are made again and thrown away. It needs a `generator`.
    """

    _taken = 0
    _skip = 0
    _begun: Tensor | None = None

    @property
    def source(self) -> torch.Generator:
        """The generator that the order comes from."""
        if self.generator is None:
            raise ValueError("generator must be given for a run to be resumed, got None")
        return self.generator

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        skip, self._skip = self._skip, 0
        if skip and self._begun is not None:
            self.source.set_state(self._begun)
        else:
            self._begun = self.source.get_state()
        self._taken = 0
        for batch in super().__iter__():
            self._taken += 1
            if self._taken > skip:
                yield batch

    def state_dict(self) -> dict[str, Any]:
        whole = self._taken >= len(self)
        order = self.source.get_state() if whole or self._begun is None else self._begun
        return {"taken": 0 if whole else self._taken, "generator": order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._skip, self._begun = state["taken"], state["generator"]
        if not self._skip:
            self.source.set_state(state["generator"])


class ShardedOrder(DistributedSampler[int]):
    """What one of several processes takes of an order: every n-th sample, the order kept.

    Lightning would shuffle a training set for them, in whatever order it was.

    Args:
        order: of all samples.
        trainer: its strategy says which processes are given the same samples; None: none are.
    """

    def __init__(self, order: Sampler[int], trainer: Any = None) -> None:
        whole: Any = order
        place = getattr(trainer, "distributed_sampler_kwargs", None) or {}
        super().__init__(whole, shuffle=False, **place)
        self.order = order

    def __iter__(self) -> Iterator[int]:
        numbers = list(self.order)
        return iter([numbers[place] for place in super().__iter__()])


class LengthBuckets(Sampler[int]):
    """Random order in which the samples of a batch are about equally long.

    Samples are sorted by `Samples.size` into `buckets` groups; batches are drawn inside a group,
    and come in random order. A group's rest may share a batch with the next.
    """

    def __init__(
        self,
        samples: Samples,
        buckets: int,
        batch_size: int,
        generator: torch.Generator | None = None,
    ) -> None:
        sizes = [samples.size(index) for index in range(len(samples))]
        unknown = [index for index, size in enumerate(sizes) if size is None]
        if unknown:
            raise ValueError(
                f"buckets must be 1 for samples of unknown size, sample {unknown[0]} of "
                f"{type(samples).__name__} has none"
            )
        order = torch.tensor([size or 0.0 for size in sizes]).argsort(stable=True)
        self.groups = order.tensor_split(buckets)
        self.batch_size, self.length, self.generator = batch_size, len(sizes), generator

    def __len__(self) -> int:
        return self.length

    def _shuffled(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator)

    def __iter__(self) -> Iterator[int]:
        shuffled = torch.cat([group[self._shuffled(len(group))] for group in self.groups])
        batches = list(shuffled.split(self.batch_size))
        # The short batch stays the last: those behind it would be cut askew.
        whole = len(batches) - (self.length % self.batch_size > 0)
        for number in [*self._shuffled(whole).tolist(), *range(whole, len(batches))]:
            yield from batches[number].tolist()

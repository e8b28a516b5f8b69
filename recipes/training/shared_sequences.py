"""What training does differently where several processes share a sequence.

D groups of processes, each with batches of its own, times P processes that share a sequence
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy, pad

import mm_sparse as mms
from mm_sparse.integrations import is_sparsified, state_of, sum_gradients
from mm_sparse.recipes.data import IGNORED
from mm_sparse.recipes.training.clipping import clip_gradients
from mm_sparse.recipes.training.sequence_strategy import SequenceParallelStrategy


class SharedSequences:
    """The processes of a `SequenceParallelStrategy`, as a module's training steps see them.

    A process gives D P times its share of a loss, so that the mean over processes is the loss, and
    the mean of the gradients its gradient, whoever takes that mean: FSDP of weights that are
    sharded, `average_gradients` of all others.

    Args:
        strategy: set up.
        decoder: the sparsified model whose sequences are shared.

    Raises:
        ValueError: the decoder is not sparsified, or cannot be split by heads.
    """

    def __init__(self, strategy: SequenceParallelStrategy, decoder: nn.Module) -> None:
        mesh = strategy.device_mesh
        self.processes, self.size = strategy.world_size, strategy.sequence
        self.groups = self.processes // self.size
        self.sharded = strategy.shard
        self._data = mesh["data_parallel"].get_group()
        self.sequence: mms.SequenceParallel | None = None
        """None where each process has sequences of its own."""
        self.group = mesh["tensor_parallel"].get_group()
        if self.size > 1:
            self.sequence = mms.sequence_parallel(decoder, self.group)
        # By `average_gradients`.
        if is_sparsified(decoder):
            state_of(decoder).shared.averaged = True
        self._keeps = "logits_to_keep" in inspect.signature(type(decoder).forward).parameters

    def total(self, count: Tensor) -> Tensor:
        """Sum over the D groups of a number that each process of a group has."""
        count = count.clone()
        dist.all_reduce(count, group=self._data)
        return count

    def loss(self, model: Any, inputs: dict[str, Any], pad_token_id: int = 0) -> Tensor:
        """D P times this process's share of the cross entropy of the next tokens of all batches.

        Args:
            model: the decoder, or what wraps it.
            inputs: of its forward for whole sequences, the same ones on the P processes, with
                labels (B, N).
            pad_token_id: of tokens that make the length a multiple of P.
        """
        sequence = self.sequence
        if sequence is None:
            return self._loss_of_own(model, inputs)
        inputs = sequence.pad(inputs, pad_token_id=pad_token_id)
        labels = inputs.pop("labels")
        count = self.total((labels[:, 1:] != IGNORED).sum())
        targets = sequence.targets(labels)
        options = {}
        if self._keeps:
            # Logits of all tokens of a long sequence would not fit.
            columns = (targets != IGNORED).any(0).nonzero().flatten()
            options["logits_to_keep"], targets = columns, targets[:, columns]
        logits = model(**inputs, use_cache=False, **options).logits
        return self.processes * self._summed(logits, targets) / count.clamp(min=1)

    def _loss_of_own(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        labels = inputs["labels"]
        count = (labels[:, 1:] != IGNORED).sum()
        own = {name: value for name, value in inputs.items() if name != "labels"}
        logits = model(**own, use_cache=False).logits[:, :-1]
        whole = self.total(count).clamp(min=1)
        return self.processes * self._summed(logits, labels[:, 1:]) / whole

    def _summed(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = targets.to(logits.device)
        return cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def anyone_has(self, here: bool, device: torch.device) -> bool:
        """Whether a batch of any of the D groups has something; all processes must ask."""
        return bool(self.total(torch.tensor(int(here), device=device)))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Means over all processes of the gradients of weights that are not sharded."""
        own = [p for p in parameters if not isinstance(p, DTensor)]
        sum_gradients(own, divisor=self.processes)

    def own_losses(self, model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (B, n) of the tokens behind those of this process, and the places of those.

        Both are of whole rows where each process has rows of its own. A loss is NaN where no token
        is behind.

        Args:
            ids: (B, N) of a text, without padding.
        """
        inputs, sequence = {"input_ids": ids, "labels": ids}, self.sequence
        if sequence is None:
            labels = pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORED)
            at = torch.arange(labels.shape[1], device=ids.device).expand_as(labels)
        else:
            inputs = sequence.pad(inputs)
            labels = inputs.pop("labels")
            at = torch.arange(labels.shape[1], device=ids.device).expand_as(labels)
            labels, at = sequence.targets(labels), sequence.split(at)
        logits = model(**inputs, use_cache=False).logits.float()
        losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return losses.view_as(at).masked_fill(labels == IGNORED, float("nan")), at

    def mean(self, losses: Tensor) -> Tensor:
        """D P times this process's share of the mean of losses of all processes, but for NaN."""
        known = ~losses.isnan()
        count = known.sum()
        dist.all_reduce(count)
        return self.processes * losses[known].sum() / count.clamp(min=1)


class SharedTraining:
    """Of a LightningModule whose processes may share sequences: what is done with gradients."""

    shared: SharedSequences | None = None
    """Where processes share sequences, or weights: under `SequenceParallelStrategy`."""
    parameters: Any

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Hook of Lightning."""
        if self.shared is not None:
            self.shared.average_gradients(self.parameters())

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:  # fmt: skip
        """Hook of Lightning."""
        if self.shared is None:
            module: Any = super()
            module.configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
        elif gradient_clip_val:
            clip_gradients(self.parameters(), gradient_clip_val, gradient_clip_algorithm)


def share_sequences(module: Any, decoder: nn.Module, shard: Any = None) -> SharedSequences | None:
    """Prepare a module in its `configure_model`; None under another strategy.

    All processes are given the trainable weights of the first one.

    Args:
        module: a LightningModule with a trainer, a `SharedTraining` for one.
        decoder: its sparsified model whose sequences are shared.
        shard: called with a mesh of all processes where weights are to be sharded.
    """
    strategy = module.trainer.strategy
    if not isinstance(strategy, SequenceParallelStrategy):
        return None
    device = strategy.root_device
    for value in module.parameters():
        if value.requires_grad:
            first = value.detach().to(device)
            dist.broadcast(first, 0)
            value.data.copy_(first)
    if strategy.shard and shard is not None:
        from torch.distributed.device_mesh import init_device_mesh

        shard(init_device_mesh(device.type, (strategy.world_size,)))
    # What is not sharded; NCCL sends what is on a GPU.
    module.to(device)
    return SharedSequences(strategy, decoder)


def share_sequences_alone(
    module: Any, decoder: nn.Module, shard: Any, what: str
) -> SharedSequences | None:
    """`share_sequences` of a module that nothing else shards.

    Args:
        what: the model, as an error names it.
    Raises:
        ValueError: the strategy shards a model in another way.
    """
    shared = share_sequences(module, decoder, shard)
    if shared is None and module.device_mesh is not None:
        raise ValueError(
            "trainer.strategy must be mm_sparse.recipes.training.SequenceParallelStrategy to "
            f"shard {what}, got {type(module.trainer.strategy).__name__}"
        )
    return shared

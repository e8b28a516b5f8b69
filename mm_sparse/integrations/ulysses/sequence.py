"""A sparsified decoder whose sequences several ranks share.

P ranks, B batch, N tokens of all ranks, n = N / P, V words
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm_sparse.integrations.discovery import scorer_shape
from mm_sparse.integrations.hf.attention import HFLayer
from mm_sparse.integrations.scorers import device_of
from mm_sparse.integrations.state import scorers_of, state_of
from mm_sparse.integrations.ulysses.batches import IGNORED, next_tokens, pad_batch, token_loss
from mm_sparse.integrations.ulysses.exchange import Group, gather
from mm_sparse.integrations.ulysses.gradients import sum_gradients
from mm_sparse.integrations.ulysses.head_split import HeadSplit
from mm_sparse.integrations.ulysses.split_cache import SplitCache
from mm_sparse.integrations.ulysses.token_split import TokenSplit, find_blocks
from mm_sparse.integrations.ulysses.tower_split import TowerSplit, find_towers


class SequenceParallel:
    """What `sequence_parallel` did to a model; used as a block, it is undone at the end."""

    def __init__(self, model: nn.Module, group: Group) -> None:
        self.model, self.group = model, group
        self.rank, self.size = group.rank(), group.size()
        self._state = state_of(model)
        self._layers = _decoder_layers(model)
        blocks = find_blocks(model, {name: layer.module for name, layer in self._layers.items()})
        cache = SplitCache()
        self._tokens = TokenSplit(blocks, group, cache)
        owner = _owner_of(model, blocks.name)
        splits = {name: _split_of(layer, group, cache) for name, layer in self._layers.items()}
        self._same_batch = False
        self._share_scorers()
        for name, layer in self._layers.items():
            layer.split_heads(splits[name])
        self._handles = self._tokens.attach(owner)
        known = {n: x for n, x in self._state.layers.items() if isinstance(x, HFLayer)}
        for tower, layers in find_towers(model, known, blocks.modules[0]):
            self._handles += TowerSplit(tower, layers, group).attach()
        self._handles.append(model.register_forward_pre_hook(self._check, with_kwargs=True))
        # `densify` takes them away, too.
        self._state.handles += self._handles

    def __enter__(self) -> SequenceParallel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """The model takes whole sequences again; a second time is harmless."""
        for handle in self._handles:
            handle.remove()
            if handle in self._state.handles:
                self._state.handles.remove(handle)
        self._handles = []
        for layer in self._layers.values():
            if layer.head_split is not None and layer.head_split.group is self.group:
                layer.split_heads(None)

    def pad(
        self, batch: dict[str, Any], *, multiple: int = 1, pad_token_id: int = 0
    ) -> dict[str, Any]:
        """A batch whose number of tokens is a multiple of P and of `multiple`; see the how-to.

        Args:
            batch: arguments of the model's forward, and labels; tensors (B, N, ...).
            multiple: that each rank's number of tokens shall be one of.
            pad_token_id: stands in input_ids behind the end.

        Raises:
            ValueError: the batch has no tokens, or a tensor of another length.
        """
        return pad_batch(batch, self.size * multiple, pad_token_id)

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """The n tokens of this rank, of a tensor with N tokens along `dim`; a view.

        Raises:
            ValueError: N is no multiple of P.
        """
        return self._tokens.take(x, dim)

    @torch.no_grad()
    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """The N tokens of all ranks, of tensors with n tokens along `dim`; without gradients."""
        return gather(x, self.group, dim % x.dim())

    def targets(self, labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
        """(B, n) labels of the tokens behind those of this rank, of labels (B, N) of all tokens.

        Raises:
            ValueError: N is no multiple of P.
        """
        return self.split(next_tokens(labels, ignore_index))

    def loss(
        self, logits: Tensor, labels: Tensor, *, count: int | Tensor | None = None,
        ignore_index: int = IGNORED,
    ) -> Tensor:  # fmt: skip
        """This rank's share of the cross entropy of next tokens; shares add up to the loss.

        Args:
            logits: (B, n, V) of this rank's tokens.
            labels: (B, N) of all tokens, as a model without `sequence_parallel` is given them;
                they are shifted here, before they are split.
            count: labels of all processes, if they have more than this batch: with data
                parallelism. None: those of this batch.
            ignore_index: label of tokens that do not count.

        Raises:
            ValueError: logits are not of this rank's tokens.
        """
        targets = next_tokens(labels, ignore_index)
        known = (targets != ignore_index).sum() if count is None else torch.as_tensor(count)
        own = self.split(targets).to(logits.device)
        return token_loss(logits, own, known.to(logits.device), ignore_index)

    def sum_gradients(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Add up gradients over the ranks; call it between backward and step, on every rank.

        For loops without DDP or FSDP over the group; these take the mean, so there the loss is
        multiplied by P instead.

        Args:
            parameters: the same on every rank; those of the model and of its scorers if None.
        """
        if parameters is None:
            parameters = [*self.model.parameters(), *scorers_of(self.model).parameters()]
        self._state.shared.averaged = True
        sum_gradients(parameters, self.group)

    @torch.no_grad()
    def _share_scorers(self) -> None:
        """Every rank has the scorers of the first one: they may have been made at random."""
        source = dist.get_global_rank(self.group, 0)
        for layer in self._layers.values():
            if layer.scorer is not None:
                # NCCL sends what is on a GPU; scorers follow a model only when it is called.
                layer.scorer.to(device_of(layer))
                for value in layer.scorer.state_dict().values():
                    # What is sharded is one value already.
                    if type(value) is Tensor:
                        dist.broadcast(value, source, group=self.group)

    def _check(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model."""
        if kwargs.get("labels") is not None:
            raise ValueError(
                "labels must not go to the forward of a model whose tokens are split between "
                "ranks: `SequenceParallel.loss` takes them with the logits"
            )
        if kwargs.get("use_cache") and torch.is_grad_enabled():
            raise ValueError(
                "use_cache must be False where tokens are split between ranks and gradients are "
                "computed"
            )
        ids = kwargs.get("input_ids", args[0] if args else None)
        if self._same_batch or not isinstance(ids, Tensor) or ids.is_floating_point():
            return
        # Once: a loader that gives each rank other rows would train on nonsense.
        ids = ids.to(next(self.model.parameters()).device)
        places = torch.arange(1, ids.numel() + 1, device=ids.device)
        mark = torch.stack([ids.new_tensor(ids.shape).sum(), (ids.flatten() * places).sum()])
        low, high = mark.clone(), mark.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN, group=self.group)
        dist.all_reduce(high, dist.ReduceOp.MAX, group=self.group)
        if not torch.equal(low, high):
            raise ValueError(
                "input_ids must be the same whole sequences on every rank of the group, got other "
                f"ones on rank {self.rank} than elsewhere"
            )
        self._same_batch = True


def sequence_parallel(model: nn.Module, group: Group | None = None) -> SequenceParallel:
    """Let the ranks of a group share the sequences of a sparsified transformers decoder.

    Tokens are split evenly between the ranks outside of attention. In each attention layer an
    all-to-all gives every rank all tokens of some KV heads, where scorer, selection and kernel run
    as on one device, and another one gives the tokens back. Every rank is given the same whole
    batch, and returns what the model makes of its own tokens; embeddings, masks and positions are
    those of whole sequences on every rank. Towers encode some images or clips on each rank.
    "DeepSpeed Ulysses" (https://arxiv.org/abs/2309.14509).

    Args:
        model: sparsified; `SparseConfig(backend="dense")` for dense attention. Another `sparsify`,
            or `densify`, undoes it.
        group: its size P divides the number K of KV heads, or K divides P; all processes if None.

    Raises:
        ValueError: the model is not sparsified, there is no process group, heads and ranks do not
            divide each other, or a block of the decoder does more with tokens than attend.

    Example:
        >>> sequence = mms.sequence_parallel(mms.sparsify(model, config))
        >>> batch = sequence.pad({"input_ids": ids, "labels": ids})
        >>> labels = batch.pop("labels")
        >>> sequence.loss(model(**batch).logits, labels).backward()
        >>> sequence.sum_gradients()
    """
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "group must be a process group, got None and no `init_process_group` before"
            )
        group = dist.group.WORLD
    if not isinstance(group, Group):
        raise TypeError(f"group must be a ProcessGroup, got {type(group).__name__}")
    return SequenceParallel(model, group)


def _decoder_layers(model: nn.Module) -> dict[str, HFLayer]:
    """Attention layers of the decoder by name; those of towers run on every rank as they are."""
    found: dict[str, HFLayer] = {}
    for name, layer in state_of(model).layers.items():
        if layer.modality is not None or not isinstance(layer, HFLayer):
            continue
        if layer.cross or layer.refusal is not None:
            raise layer_error(layer, layer.refusal or "it attends to another sequence")
        if layer.head_split is not None:
            raise layer_error(layer, "it is split already, remove that first")
        found[name] = layer
    if not found:
        raise ValueError("model must have a decoder of transformers, got none that is sparsified")
    return found


def layer_error(layer: HFLayer, why: str) -> ValueError:
    """The error of a layer whose heads cannot be split."""
    kind = type(layer.module).__name__
    return ValueError(f"{layer.name} ({kind}) cannot be split by heads: {why}")


def _split_of(layer: HFLayer, group: Group, cache: SplitCache) -> HeadSplit:
    """How the heads of a layer are split, once all is checked that can be before a call."""
    heads, kv_heads, _ = scorer_shape(layer.module)
    split = HeadSplit(layer.name, (heads, kv_heads), group, cache)
    if layer.scorer is not None:
        split.scorer_of(layer.scorer)
    return split


def _owner_of(model: nn.Module, blocks: str) -> nn.Module:
    """The innermost transformers model around a list of blocks."""
    from transformers import PreTrainedModel

    parts = blocks.split(".")
    modules = [model.get_submodule(".".join(parts[:at])) for at in range(len(parts), -1, -1)]
    return next(m for m in modules if isinstance(m, PreTrainedModel))

"""Training of the recipes' models: teacher forcing, distillation losses of the scorers, what is
logged.

A answers
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

import mm_sparse as mms
from mm_sparse.distillation import distillation_losses
from mm_sparse.recipes.data import IGNORED, Batch
from mm_sparse.recipes.models.multimodal_base import MultimodalBase
from mm_sparse.recipes.training import WHOLE, average, clip_gradients, optimize


@dataclass(frozen=True, eq=False)
class AnswerLoss:
    """What the model said where it was asked."""

    loss: Tensor
    exact: Tensor
    """(A,) bool: every token of the answer was the likeliest one, given those before it."""


@dataclass(frozen=True, eq=False)
class AnswerLogits:
    """Predictions of the answer tokens of a batch, P of them."""

    logits: Tensor
    """(P, vocabulary) float32."""
    labels: Tensor
    """(P,) true ids."""
    answer: Tensor
    """(P,) number of the answer that each is of."""
    row: Tensor
    """(P,) row of the batch."""

    def exact(self, answers: int | None = None) -> Tensor:
        """(A,) bool, as `AnswerLoss` has it; A is that of the last one here if None."""
        answers = int(self.answer.max()) + 1 if answers is None else answers
        exact = torch.ones(answers, dtype=torch.int8, device=self.labels.device)
        right = (self.logits.argmax(-1) == self.labels).to(torch.int8)
        return exact.scatter_reduce(0, self.answer, right, "amin").bool()


class MultimodalTraining(MultimodalBase):
    """A `MultimodalBase` that learns to give the answers of its batches."""

    def forward(self, batch: Batch) -> AnswerLoss:
        """Teacher forcing: every token of an answer is predicted from the true ones before it."""
        labels = batch["labels"][:, 1:]
        if not labels.numel() or not bool((labels != IGNORED).any()):
            nothing = sum(p.sum() * 0 for p in self.parameters() if p.requires_grad)
            return AnswerLoss(torch.as_tensor(nothing), labels.new_zeros(0, dtype=torch.bool))
        said = self.answers(batch)
        if self.shared is None or self.sequence is None:
            return AnswerLoss(cross_entropy(said.logits, said.labels), said.exact())
        return self._shared_loss(said, batch)

    def _shared_loss(self, said: AnswerLogits, batch: Batch) -> AnswerLoss:
        """Of which the mean over the processes that share sequences is the loss."""
        shared: Any = self.shared
        asked = batch["labels"][:, 1:] != IGNORED
        count = shared.total(asked.sum())
        summed = cross_entropy(said.logits, said.labels, reduction="sum")
        exact = said.exact(int(batch["answer_index"][:, 1:][asked].max()) + 1).int()
        torch.distributed.all_reduce(exact, torch.distributed.ReduceOp.MIN, group=shared.group)
        return AnswerLoss(shared.processes * summed / count, exact.bool())

    def answers(self, batch: Batch) -> AnswerLogits:
        """What a batch with answers makes the model say where it is asked.

        Where sequences are shared, at this process's tokens.
        """
        # Those of the next token.
        labels = pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        answer = pad(batch["answer_index"][:, 1:], (0, 1))
        if self.sequence is not None:
            missing = -labels.shape[1] % self.sequence.size
            labels = self.sequence.split(pad(labels, (0, missing), value=IGNORED))
            answer = self.sequence.split(pad(answer, (0, missing)))
        # Logits of all positions of a long image would not fit for a large vocabulary.
        columns = (labels != IGNORED).any(0).nonzero().flatten()
        logits = self.run(batch, logits_to_keep=columns).logits
        labels, answer = labels[:, columns], answer[:, columns]
        asked = labels != IGNORED
        rows = asked.nonzero()[:, 0]
        return AnswerLogits(logits[asked].float(), labels[asked], answer[asked], rows)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        goals, loss = self.objectives, torch.zeros((), device=self.device)
        changed = {
            name: replace(config, **goals.changes(config, self.global_step))
            for name, config in self.sparse_configs.items()
            if goals.changes(config, self.global_step)
        }
        dense = any(config.backend == "dense" for config in changed.values())
        due = goals.scorers > 0 and self.global_step % goals.scorers_every == 0
        from_dense = due and (dense or goals.teacher == "dense")
        if goals.language or (due and not from_dense):
            with ExitStack() as stack:
                stack.enter_context(self.running(changed))
                learned = None
                if due and not from_dense:
                    learned = stack.enter_context(self.distillation_losses())
                verdict = self(batch)
            loss = loss + goals.language * verdict.loss
            self.log_all("train", verdict, batch)
            if learned is not None:
                loss = loss + self.taught(self.mean_loss(learned))
        if from_dense:
            loss = loss + self.taught(self.dense_distillation_loss(batch))
        return loss

    def override_config(self, **changes: Any) -> AbstractContextManager[None]:
        """Every sparse part with another config of its attention, for a while."""
        if not self.sparse_configs:
            raise ValueError("sparse must be given for the model to run sparse, got None")
        return self.running({n: replace(c, **changes) for n, c in self.sparse_configs.items()})

    @contextmanager
    def running(self, configs: dict[str, mms.SparseConfig]) -> Iterator[None]:
        """The named parts with these configs; layers and scorers stay attached."""
        with ExitStack() as stack:
            for name, config in configs.items():
                changes = {f.name: getattr(config, f.name) for f in fields(config)}
                stack.enter_context(mms.override_config(getattr(self, name), **changes))
            yield

    @contextmanager
    def distillation_losses(self) -> Iterator[list[Any]]:
        """What the scorers of every sparse part learn inside."""
        with ExitStack() as stack:
            parts = [getattr(self, name) for name in self.sparse_configs]
            drawn = self.objectives.drawing(self.global_step, self.device)
            yield [stack.enter_context(distillation_losses(part, **drawn)) for part in parts]

    def dense_distillation_loss(self, batch: Batch) -> Tensor:
        """The scorers' divergence from the attention of a run that keeps everything."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.override_config(**WHOLE))
            learned = stack.enter_context(self.distillation_losses())
            self.run(batch, logits_to_keep=1)
        return self.mean_loss(learned)

    def mean_loss(self, losses_by_part: list[Any]) -> Tensor:
        """Mean over the layers of all parts; zero where no layer with a scorer ran sparse.

        Where sequences are shared, the mean over processes is that.
        """
        # Of a layer of the language model a process has some heads, of others it has all.
        share = 1 if self.sequence is None else self.sequence.size
        losses = [
            loss * share if name == "language" else loss
            for name, part in zip(self.sparse_configs, losses_by_part, strict=True)
            for loss in part.losses.values()
        ]
        return torch.stack(losses).mean() if losses else torch.zeros(())

    def taught(self, attention_kl: Tensor) -> Tensor:
        """Weighted and logged."""
        several = self.shared is not None
        self.log("train/scorer_kl", attention_kl.detach(), prog_bar=True, sync_dist=several)
        return self.objectives.scorers * attention_kl

    def log_all(self, stage: str, verdict: AnswerLoss, batch: Batch) -> None:
        answers = len(verdict.exact)
        if not answers:
            return
        whole = stage != "train"
        values = {"loss": verdict.loss.detach(), "exact_match": verdict.exact.float().mean()}
        for name, value in values.items():
            self.log(
                f"{stage}/{name}",
                value,
                prog_bar=True,
                on_step=not whole,
                on_epoch=whole,
                batch_size=answers,
                sync_dist=whole or self.shared is not None,
            )

    def validation_step(self, batch: Batch, index: int) -> None:
        self.log_all("validation", self(batch), batch)

    def test_step(self, batch: Batch, index: int) -> None:
        self.log_all("test", self(batch), batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A sharded run resumes only if every parameter has a state: a step by zero makes one."""
        if self.shared is not None:
            # Checkpoints of `SequenceParallelStrategy` do without.
            self.shared.average_gradients(self.parameters())
            return
        if self.device_mesh is None:
            return
        average(self.scorers.parameters())
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter.grad is None and parameter not in optimizer.state:
                parameter.grad = torch.zeros_like(parameter)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:  # fmt: skip
        if self.device_mesh is None:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
        elif gradient_clip_val:
            clip_gradients(self.parameters(), gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        return optimize(self.optimizer_part, self, self.parts, steps)

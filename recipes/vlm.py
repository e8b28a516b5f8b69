"""A vision-language model with sparse attention, as a LightningModule.

    python -m mm_sparse.recipes.vlm fit --config recipes/vlm_digits.yaml

Pictures go through a tower and a projector, and take the places of image tokens among the text. The
language model runs sparse if `sparse` is given, dense if not; all else is the same.

B rows, L tokens, I pictures, A answers, E width of the language model
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mm_sparse as mms
from mm_sparse.recipes.lessons import lessons
from mm_sparse.recipes.objectives import Objectives
from mm_sparse.recipes.parts import (
    LanguagePart,
    LoraPart,
    OptimizerPart,
    ProjectorPart,
    VisionPart,
)
from mm_sparse.recipes.samples import IGNORED, Batch
from mm_sparse.recipes.schedule import adamw
from mm_sparse.recipes.vocabulary import Tokenizer
from mm_sparse.retrofit import given_modality, scorers

Part = Literal["vision", "projector", "language", "scorers"]
PARTS: tuple[Part, ...] = ("vision", "projector", "language", "scorers")


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the model said where it was asked."""

    loss: Tensor
    exact: Tensor
    """(A,) bool: every token of the answer was the likeliest one, given those before it."""


class VLM(L.LightningModule):
    """Tower, projector, language model; what is trained, and what is logged."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vision: VisionPart | None = None,
        language: LanguagePart | None = None,
        projector: ProjectorPart | None = None,
        sparse: mms.SparseConfig | None = None,
        scorer: Literal["pooled", "relevance"] = "relevance",
        objectives: Objectives | None = None,
        optimizer: OptimizerPart | None = None,
        freeze: tuple[Part, ...] = (),
        lora: LoraPart | None = None,
        checkpointing: bool = False,
        weights: str | None = None,
    ) -> None:
        """
        Args:
            tokenizer: size of the vocabulary and id of the image token.
            sparse: what the language model's layers keep; None runs them dense.
            scorer: what ranks the keys: the training-free score, or one that learns.
            freeze: parts that are not trained.
            lora: adapters on the language model, whose own weights are then frozen.
            checkpointing: recompute the language model's layers in the backward pass.
            weights: checkpoint of an earlier run to start from, dense or sparse; step, optimizer
                and, where it has none, scorers start anew.
        """
        super().__init__()
        unknown = [part for part in freeze if part not in PARTS]
        if unknown:
            raise ValueError(f"freeze must name parts among {PARTS}, got {unknown[0]!r}")
        self.objectives = objectives or Objectives()
        if self.objectives.scorers and (sparse is None or scorer != "relevance"):
            raise ValueError(
                "objectives.scorers must be 0 unless the model is sparse with scorer='relevance', "
                f"got {self.objectives.scorers}"
            )
        if checkpointing and (self.objectives.scorers or self.objectives.changing_steps):
            raise ValueError(
                "checkpointing must be off while scorers learn or the ratio changes, got True"
            )
        self.image_id, self.pad_id = tokenizer.image_id, tokenizer.pad_id
        self.sparse_config = sparse
        self.optimizer_part = optimizer or OptimizerPart()
        self.vision = (vision or VisionPart()).build()
        self.language: Any = (language or LanguagePart()).build(tokenizer.size)
        self.projector = (projector or ProjectorPart()).build(
            self.vision.width, self.language.get_input_embeddings().embedding_dim
        )
        self.frozen = tuple(part for part in freeze if part != "scorers")
        for part in self.frozen:
            getattr(self, part).requires_grad_(False)
        if lora is not None:
            self.language.requires_grad_(False)
            lora.apply(self.language)
        if checkpointing:
            self.language.gradient_checkpointing_enable({"use_reentrant": False})
        self.scorers = nn.ModuleDict()
        if sparse is not None:
            learned = "relevance" if scorer == "relevance" else None
            mms.sparsify(self.language, sparse, scorer=learned)
            self.scorers = scorers(self.language)
            # Only a lesson gives scorers a gradient: selection itself passes none.
            learns = self.objectives.scorers > 0 and "scorers" not in freeze
            self.scorers.requires_grad_(learns)
        if weights is not None:
            load_weights(self, weights)

    def embed(self, batch: Batch) -> Tensor:
        """(B, L, E): embeddings of the text, pictures in place of the image tokens."""
        ids, pictures = batch["input_ids"], batch["pixel_values"]
        places = ids == self.image_id
        # The image token may lie behind the table; its own row is never used.
        embedded = self.language.get_input_embeddings()(ids.masked_fill(places, self.pad_id))
        if not len(pictures):
            return embedded + 0 * sum(p.sum() for p in self.projector.parameters())
        tokens, _ = self.projector(*self.vision(pictures))
        if tokens.shape[0] * tokens.shape[1] != int(places.sum()):
            raise ValueError(
                f"batch must have an image token per patch, {tokens.shape[0]} pictures of "
                f"{tokens.shape[1]}, got {int(places.sum())}"
            )
        return embedded.masked_scatter(places[..., None], tokens.to(embedded.dtype))

    @contextmanager
    def context(self, batch: Batch) -> Iterator[None]:
        """The language model runs inside: its layers learn there which tokens are pictures."""
        with ExitStack() as stack:
            if self.sparse_config is not None:
                modality = (batch["input_ids"] == self.image_id).to(torch.int8)
                stack.enter_context(given_modality(self.language, modality))
            yield

    def run(self, batch: Batch, **options: Any) -> Any:
        """The language model's output on a batch, padded on the right."""
        mask = batch["attention_mask"]
        # No token that counts sees padding behind it: without a mask dense attention is fastest.
        behind = bool((mask[:, 1:] <= mask[:, :-1]).all())
        with self.context(batch):
            return self.language(
                inputs_embeds=self.embed(batch),
                attention_mask=None if behind else mask.long(),
                use_cache=False,
                **options,
            )

    def forward(self, batch: Batch) -> Verdict:
        """Teacher forcing: every token of an answer is predicted from the true ones before it."""
        labels, answer = batch["labels"][:, 1:], batch["answer_index"][:, 1:]
        if not labels.numel() or not bool((labels != IGNORED).any()):
            nothing = sum(p.sum() * 0 for p in self.parameters() if p.requires_grad)
            return Verdict(torch.as_tensor(nothing), labels.new_zeros(0, dtype=torch.bool))
        # Logits of all positions of a long picture would not fit for a large vocabulary.
        columns = (labels != IGNORED).any(0).nonzero().flatten()
        logits = self.run(batch, logits_to_keep=columns).logits
        labels, answer = labels[:, columns], answer[:, columns]
        asked = labels != IGNORED
        logits, labels, answer = logits[asked].float(), labels[asked], answer[asked]
        exact = torch.ones(int(answer.max()) + 1, dtype=torch.int8, device=labels.device)
        right = (logits.argmax(-1) == labels).to(torch.int8)
        exact = exact.scatter_reduce(0, answer, right, "amin")
        return Verdict(cross_entropy(logits, labels), exact.bool())

    def training_step(self, batch: Batch, index: int) -> Tensor:
        goals, loss = self.objectives, torch.zeros((), device=self.device)
        changes = goals.changes(self.sparse_config, self.global_step)
        dense = changes.get("backend") == "dense"
        due = goals.scorers > 0 and self.global_step % goals.scorers_every == 0
        from_dense = due and (dense or goals.teacher == "dense")
        if goals.language or (due and not from_dense):
            with ExitStack() as stack:
                if changes:
                    stack.enter_context(self.keeping(**changes))
                learned = None
                if due and not from_dense:
                    learned = stack.enter_context(lessons(self.language))
                verdict = self(batch)
            loss = loss + goals.language * verdict.loss
            self.log_all("train", verdict, batch)
            if learned is not None:
                loss = loss + self.taught(learned.mean())
        if from_dense:
            loss = loss + self.taught(self.dense_lesson(batch))
        return loss

    def keeping(self, **changes: Any) -> AbstractContextManager[Any]:
        """The language model with another config of its sparse attention, for a while."""
        if self.sparse_config is None:
            raise ValueError("sparse must be given for the model to run sparse, got None")
        return mms.sparse(self.language, replace(self.sparse_config, **changes))

    def dense_lesson(self, batch: Batch) -> Tensor:
        """The scorers' divergence from the attention of a run that keeps everything."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.keeping(ratio=1.0, tokens=None, mass=None))
            learned = stack.enter_context(lessons(self.language))
            self.run(batch, logits_to_keep=1)
        return learned.mean()

    def train(self, mode: bool = True) -> "VLM":
        """Frozen parts stay as in evaluation: their statistics must not drift either."""
        super().train(mode)
        for part in self.frozen:
            getattr(self, part).eval()
        return self

    def taught(self, divergence: Tensor) -> Tensor:
        """Weighted and logged."""
        self.log("train/scorer_kl", divergence.detach(), prog_bar=True)
        return self.objectives.scorers * divergence

    def log_all(self, stage: str, verdict: Verdict, batch: Batch) -> None:
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
                sync_dist=whole,
            )

    def validation_step(self, batch: Batch, index: int) -> None:
        self.log_all("validation", self(batch), batch)

    def test_step(self, batch: Batch, index: int) -> None:
        self.log_all("test", self(batch), batch)

    def configure_optimizers(self) -> Any:
        part = self.optimizer_part
        rates = {"scorers": part.scorer_lr, "projector": part.projector_lr}
        groups: list[dict[str, Any]] = []
        for name in PARTS:
            own = [p for p in getattr(self, name).parameters() if p.requires_grad]
            speed = rates.get(name) or part.lr
            # Matrices decay; norms, biases and whatever ranks keys do not.
            decays = [p for p in own if p.ndim > 1 and name != "scorers"]
            rest = [p for p in own if p.ndim < 2 or name == "scorers"]
            groups.append({"params": decays, "weight_decay": part.weight_decay, "lr": speed})
            groups.append({"params": rest, "weight_decay": 0.0, "lr": speed})
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise ValueError(f"freeze must leave something to train, got all of {PARTS}")
        return adamw(groups, part, max(int(self.trainer.estimated_stepping_batches), 1))


def load_weights(model: VLM, path: str) -> None:
    """Weights of a checkpoint of the same model; scorers that it lacks stay as they are."""
    if not Path(path).is_file():
        raise ValueError(f"weights must be a checkpoint, got {path!r}, which is no file")
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    if not model.scorers:
        found = {name: value for name, value in found.items() if not name.startswith("scorers.")}
    missing, unknown = model.load_state_dict(found, strict=False)
    missing = [name for name in missing if not name.startswith("scorers.")]
    if missing or unknown:
        raise ValueError(
            f"weights must be of a model with the same parts, {path} lacks {missing[:3]} "
            f"and has {unknown[:3]} beside"
        )


if __name__ == "__main__":
    from mm_sparse.recipes.cli import main

    main()

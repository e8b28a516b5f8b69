"""A checkpoint of transformers that learns on, dense or sparse, whole or by adapters.

A answers
"""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import mm_sparse as mms
from mm_sparse.checkpoints import read_scorers, scorers_folder
from mm_sparse.distillation import distillation_losses
from mm_sparse.integrations import is_sparsified
from mm_sparse.recipes.data import IGNORED
from mm_sparse.recipes.finetuning.adapters import add_adapters, merged_weights
from mm_sparse.recipes.finetuning.answer_loss import answer_loss
from mm_sparse.recipes.finetuning.chat_collator import ANSWERS, EXTRA, PROMPTS
from mm_sparse.recipes.finetuning.checkpoint_folders import (
    language_part,
    load_model,
    load_processor,
)
from mm_sparse.recipes.finetuning.packing import check_packs, pack_rows
from mm_sparse.recipes.metrics import exact_match, token_f1
from mm_sparse.recipes.models import RECIPE, LoraConfig, ScorerName, from_checkpoint
from mm_sparse.recipes.training import (
    WHOLE,
    Objectives,
    OptimizerConfig,
    SharedTraining,
    optimize,
    read_checkpoint,
    shard_decoder,
    share_sequences_alone,
    whole_tensors,
)

logger = logging.getLogger(__name__)
Batch = dict[str, Any]
"""Of `ChatCollator`."""


class CheckpointModel(SharedTraining, L.LightningModule):
    """A vision-language or speech-language model of a folder, on conversations of `ChatData`.

    Example:
        >>> module = CheckpointModel("SmolVLM-Instruct", mms.SparseConfig(bidirectional=()))
        >>> L.Trainer(max_steps=100).fit(module, ChatData("SmolVLM-Instruct", samples))
        >>> module.export("exported")
    """

    parts = ("model", "scorers")

    def __init__(
        self,
        folder: str,
        sparse: mms.SparseConfig | None = None,
        *,
        scorer: ScorerName = "fine",
        scorers_from: str | None = None,
        strict: bool = True,
        objectives: Objectives | None = None,
        lora: LoraConfig | None = None,
        freeze: tuple[str, ...] = (),
        processor: dict[str, Any] | None = None,
        dtype: str = "auto",
        load_in_4bit: bool = False,
        checkpointing: bool = False,
        pack: bool = False,
        optimizer: OptimizerConfig | None = None,
        max_new_tokens: int = 64,
        out: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            folder: of the model and its processor, or a name that is downloaded.
            sparse: what layers keep; None takes the config beside `scorers_from`, or runs dense.
            scorer: what ranks units of a sparse model.
            scorers_from: folder of `save_scorers` to start from; untrained ones if None.
            strict: whether a layer that cannot run sparse is an error; else it stays dense.
            objectives: weights of losses. With `language: 0` the model is frozen, and its scorers
                alone learn from its dense attention.
            lora: adapters on the language model, all else frozen; None trains all of it.
            freeze: names of submodules that stay as they are, "model.vision_model" for one.
            processor: arguments of `AutoProcessor.from_pretrained`, `max_pixels` for one.
            dtype: of the weights, "bfloat16" for one; "auto" takes that of the folder.
            load_in_4bit: hold the frozen weights in 4 bits, under adapters; needs bitsandbytes.
            checkpointing: compute layers again in the backward pass, to save memory.
            pack: put the conversations of a training batch into one row, each a document of its
                own, instead of padding them.
            max_new_tokens: longest answer in validation and prediction; 0 generates none in
                validation.
            out: folder that is exported to at the end: the model with its scorers, or
                `out/scorers` alone where the model is frozen.
            options: further arguments of `from_pretrained`.
        Raises:
            ValueError: an argument does not fit the folder or another argument.
        """
        super().__init__()
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.recipe_arguments = {name: _plain(value) for name, value in given.items()}
        self.objectives = objectives or Objectives()
        self.teaches = not self.objectives.language
        is_sparse = sparse is not None or scorers_from is not None
        if self.objectives.scorers and (not is_sparse or scorer == "pooled"):
            raise ValueError(
                "objectives.scorers must be 0 unless the model is sparse and its scorer learns, "
                f"got {self.objectives.scorers}"
            )
        if load_in_4bit and lora is None and not self.teaches:
            raise ValueError("lora must be given with load_in_4bit, got None")
        if lora is not None and self.teaches:
            raise ValueError("lora must be None where objectives.language is 0, got an adapter")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        self.folder, self.lora, self.pack = folder, lora, pack
        self._warned = False
        self.max_new_tokens, self.out = max_new_tokens, out
        self.optimizer_part = optimizer or OptimizerConfig()
        self.processor = load_processor(folder, **(processor or {}))
        model = load_model(folder, dtype=dtype, load_in_4bit=load_in_4bit, **(options or {}))
        if pack:
            check_packs(model)
        self.scorers = _sparsify(model, sparse, scorer, scorers_from, strict)
        if load_in_4bit:
            from peft import prepare_model_for_kbit_training

            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if self.teaches:
            model.requires_grad_(False)
        for name in freeze:
            _submodule(model, name).requires_grad_(False)
        self.model: Any = model if lora is None else add_adapters(model, lora)
        if checkpointing and not self.teaches:
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
            # Frozen embeddings and towers would be differentiated for nothing. peft asks for it
            # where it finds checkpointing, so this comes behind the adapters.
            self.base.disable_input_require_grads()
        # Only a distillation loss gives scorers a gradient: selection itself passes none.
        self.scorers.requires_grad_(self.objectives.scorers > 0)
        # Weights that stay as they are in the folder are not written into checkpoints.
        self.strict_loading = all(p.requires_grad for p in self.parameters())
        self.train()

    @property
    def base(self) -> Any:
        """The model of transformers, without peft around it."""
        return self.model if self.lora is None else self.model.get_base_model()

    @property
    def pad_id(self) -> int:
        """Of the processor's tokenizer, 0 if it has none."""
        found = getattr(getattr(self.processor, "tokenizer", None), "pad_token_id", None)
        return int(found or 0)

    def configure_model(self) -> None:
        """Under `SequenceParallelStrategy`: share sequences, and weights if it says so.

        Raises:
            ValueError: the model is not sparse, or cannot be shared.
        """
        if self.shared is None:
            self.shared = share_sequences_alone(self, self.base, self._shard, "a checkpoint")

    def _shard(self, mesh: Any) -> None:
        shard_decoder(self.model, self.base.get_submodule(language_part(self.base)), mesh)

    def train(self, mode: bool = True) -> CheckpointModel:
        """Train mode, but of a model that is only looked at while its scorers learn."""
        super().train(mode)
        if self.teaches:
            self.model.eval()
        return self

    def on_train_start(self) -> None:
        self.train()

    def forward(self, batch: Batch) -> Any:
        """The model's own output, with its `loss` on the answers of a batch that has labels.

        Where sequences are shared, it is the output for this process's tokens.
        """
        return self.model(**self._inputs(batch), use_cache=False)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """Of the model's forward."""
        inputs = {name: value for name, value in batch.items() if name not in EXTRA}
        if self.pack and self.training and "labels" in inputs:
            inputs = pack_rows(self.base, inputs)
        return inputs

    def loss(self, batch: Batch) -> Tensor:
        """Of the answers; where processes share sequences, the mean over processes is the loss."""
        if self.shared is None:
            return answer_loss(self.model, self.base, self._inputs(batch))
        return self.shared.loss(self.model, self._inputs(batch), self.pad_id)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        goals, loss = self.objectives, torch.zeros((), device=self.device)
        if self.shared is not None and self.shared.anyone_has(bool(batch), self.device):
            # Every process takes part in the collectives of a step.
            batch = batch or self._empty_row()
        if not batch:
            return self._nothing()
        config = mms.sparse_config(self.base) if len(self.scorers) else None
        changed = goals.changes(config, self.global_step)
        dense = changed.get("backend") == "dense"
        due = goals.scorers > 0 and self.global_step % goals.scorers_every == 0
        from_dense = due and (dense or self.teaches or goals.teacher == "dense")
        size = len(batch["labels"])
        if goals.language:
            with ExitStack() as stack:
                if changed:
                    stack.enter_context(mms.override_config(self.base, **changed))
                learned = None
                if due and not from_dense:
                    drawn = goals.drawing(self.global_step, self.device)
                    learned = stack.enter_context(distillation_losses(self.base, **drawn))
                own = self.loss(batch)
            self._log("train/loss", own, size)
            loss = loss + goals.language * own
            if learned is not None:
                loss = loss + self._scorer_loss(learned.mean(), size)
        if from_dense:
            drawn = goals.drawing(self.global_step, self.device)
            with (
                torch.no_grad(),
                mms.override_config(self.base, **WHOLE),
                distillation_losses(self.base, **drawn) as learned,
            ):
                self._look(batch)
            loss = loss + self._scorer_loss(learned.mean(), size)
        return loss if loss.requires_grad else self._nothing()

    def _look(self, batch: Batch) -> None:
        """A forward pass for those who watch."""
        inputs = self._inputs(batch)
        if self.shared is not None and self.shared.sequence is not None:
            inputs = self.shared.sequence.pad(inputs, pad_token_id=self.pad_id)
            inputs.pop("labels")
        self.model(**inputs, use_cache=False)

    def _empty_row(self) -> Batch:
        """A batch of one row in which nothing is learned."""
        ids = torch.full((1, 2), self.pad_id, device=self.device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.full_like(ids, IGNORED),
        }

    def _nothing(self) -> Tensor:
        """A loss of zero, for a step in which there is nothing to learn from."""
        learning = [p for p in self.parameters() if p.requires_grad]
        own = [p.to_local() if isinstance(p, DTensor) else p for p in learning]
        return torch.stack([0 * p.sum() for p in own]).sum()

    def _log(self, name: str, value: Tensor, size: int) -> None:
        several = self.shared is not None
        self.log(name, value.detach(), prog_bar=True, batch_size=size, sync_dist=several)

    def _scorer_loss(self, attention_kl: Tensor, size: int) -> Tensor:
        if not attention_kl.requires_grad and not self._warned:
            self._warned = True
            logger.warning(
                "no scorer learned in step %d: no layer ran sparse, set sparse.dense_below below "
                "the tokens of a conversation", self.global_step,
            )  # fmt: skip
        if self.shared is not None:
            # Of the heads of this process, which the others of its group do not have.
            attention_kl = self.shared.size * attention_kl.to(self.device)
        self._log("train/scorer_kl", attention_kl, size)
        return self.objectives.scorers * attention_kl

    def validation_step(self, batch: Batch, index: int) -> None:
        self._score("validation", batch)

    def test_step(self, batch: Batch, index: int) -> None:
        self._score("test", batch)

    def predict_step(self, batch: Batch, index: int) -> list[dict[str, str]]:
        """What the model says to each conversation, and its true last answer."""
        if not batch:
            return []
        said = self.generate(batch[PROMPTS])
        pairs = zip(said, batch[ANSWERS], strict=True)
        return [{"said": answer, "wanted": wanted} for answer, wanted in pairs]

    def _score(self, stage: str, batch: Batch) -> None:
        """Log the loss, and how well answers match that the model generates."""
        if self.shared is not None and self.shared.anyone_has(not batch, self.device):
            return
        if not batch:
            return
        figures = {"loss": self.loss(batch)}
        if self.max_new_tokens:
            pairs = [(x["said"], x["wanted"]) for x in self.predict_step(batch, 0)]
            figures["exact_match"] = torch.tensor([exact_match(*p) for p in pairs]).float().mean()
            figures["token_f1"] = torch.tensor([token_f1(*p) for p in pairs]).mean()
        own = {f"{stage}/{name}": value.to(self.device) for name, value in figures.items()}
        self.log_dict(own, prog_bar=True, batch_size=len(batch["labels"]), sync_dist=True)

    @torch.no_grad()
    def generate(self, prompts: Batch, **options: Any) -> list[str]:
        """Answers to prompts that the processor made, padded on the left; greedy by default.

        Args:
            prompts: inputs of the processor, `prompts` of a batch for one.
            options: of transformers' `generate`.
        """
        wanted = {"max_new_tokens": self.max_new_tokens or 64, "do_sample": False, **options}
        if self.shared is not None and self.shared.sharded:
            # Weights are gathered by all: those who are done go on until the others are.
            wanted.setdefault("synced_gpus", True)
        ids = self.model.generate(**prompts, use_cache=True, **wanted)
        new = ids[:, prompts["input_ids"].shape[1] :]
        said = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in said]

    def export(self, folder: str | Path, *, merge: bool = True) -> None:
        """Write model and processor for `from_pretrained`, and `folder/scorers` if it is sparse.

        Args:
            merge: add adapters to the weights; False writes the adapter alone, as peft reads it.
        Raises:
            ValueError: adapters of weights in 4 bits are to be merged.
        """
        shared = self.shared is not None
        if self.lora is None:
            self._write(self.base, folder, self.base.state_dict() if shared else None)
        elif merge:
            self._write(self.base, folder, merged_weights(self.model))
        else:
            self._write(self.model, folder, self.model.state_dict() if shared else None)
        if not self._writes:
            return
        self.processor.save_pretrained(folder)
        if is_sparsified(self.base):
            mms.save_scorers(self.base, Path(folder) / "scorers")

    @property
    def _writes(self) -> bool:
        """Whether this process writes files."""
        return self.shared is None or self.trainer.is_global_zero

    def _write(self, model: Any, folder: str | Path, weights: Any) -> None:
        if weights is not None:
            weights = whole_tensors(weights.items())
        if self._writes:
            model.save_pretrained(folder, state_dict=weights)

    def on_fit_end(self) -> None:
        sharded = self.shared is not None and self.shared.sharded and not self.teaches
        if self.out is None or not (sharded or self.trainer.is_global_zero):
            return
        if self.teaches:
            mms.save_scorers(self.base, Path(self.out) / "scorers")
        else:
            self.export(self.out, merge=not getattr(self.base, "is_quantized", False))

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        return optimize(self.optimizer_part, self, self.parts, steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        path = f"{type(self).__module__}.{type(self).__qualname__}"
        model = {"class_path": path, "init_args": self.recipe_arguments}
        checkpoint[RECIPE] = json.dumps({"model": model, "tokenizer": None})
        kept = self.stored_names()
        checkpoint["state_dict"] = {
            name: value for name, value in checkpoint["state_dict"].items() if name in kept
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        missing = sorted(self.stored_names() - set(checkpoint["state_dict"]))
        if missing:
            raise ValueError(
                f"checkpoint must be of a run with the same settings, got one without {missing[0]}"
            )

    def stored_names(self) -> set[str]:
        """Names of weights that are not those of the folder: what learns, and all scorers."""
        if self.strict_loading:
            return set(self.state_dict())
        own = {name for name, p in self.named_parameters() if p.requires_grad}
        return own | {f"scorers.{name}" for name in self.scorers.state_dict()}

    def read_weights(self, path: str) -> None:
        """Weights of a checkpoint of the same model.

        Raises:
            ValueError: it lacks some that learn here.
        """
        stored = read_checkpoint(path)
        self.on_load_checkpoint(stored)
        self.load_state_dict(stored["state_dict"], strict=self.strict_loading)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The model of a checkpoint in eval mode; its folder and `scorers_from` must be there.

        Raises:
            ValueError: no file, or a checkpoint of another module.
        """
        if args or kwargs:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        return from_checkpoint(checkpoint_path)


def _sparsify(
    model: Any,
    sparse: mms.SparseConfig | None,
    scorer: ScorerName,
    scorers_from: str | None,
    strict: bool,
) -> nn.ModuleDict:
    """Make a model sparse if it is asked for; its scorers, in float32."""
    if sparse is None and scorers_from is None:
        return nn.ModuleDict()
    if sparse is None and scorers_from is not None and not strict:
        sparse = read_scorers(scorers_folder(scorers_from)).config
    if sparse is not None:
        learned = None if scorer == "pooled" else scorer
        mms.sparsify(model, sparse, scorer=learned, strict=strict)
    if scorers_from is not None:
        mms.load_scorers(model, scorers_from)
    return mms.scorers_of(model).float()


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        inside = [
            f"{a}.{b}" for a, part in model.named_children() for b, _ in part.named_children()
        ]
        raise ValueError(
            f"freeze must name submodules of {type(model).__name__}, {', '.join(inside[:8])} for "
            f"some, got {name!r}"
        ) from None


def _plain(value: Any) -> Any:
    """An argument as JSON has it."""
    if isinstance(value, mms.SparseConfig):
        record = json.loads(value.to_json())
        # Not a field: it says what the others speak of.
        record.pop("modalities")
        return record
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return list(value) if isinstance(value, tuple) else value

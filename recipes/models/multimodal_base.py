"""A causal language model that reads text, images and audio, sparse where it is told to be.

Images and audio go through towers and projectors, and take the places of their tokens among the
text. Each part of `sparse` runs sparse with its own config; parts without one run dense.

B rows, L tokens, E width of the language model
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import mm_sparse as mms
from mm_sparse.checkpoints import read_scorers, scorers_folder
from mm_sparse.integrations import find_all, scorers_of, set_modality
from mm_sparse.modality import Modality
from mm_sparse.recipes.data import IGNORED, Batch, Tokenizer
from mm_sparse.recipes.models.exported import RECIPE, export_language, from_checkpoint
from mm_sparse.recipes.models.language import LoraConfig
from mm_sparse.recipes.training import (
    Objectives,
    OptimizerConfig,
    SharedSequences,
    gather_embeddings,
    hide_embeddings,
    is_sharded,
    read_checkpoint,
    shard,
    share_sequences,
)

ScorerName = Literal["pooled", "relevance", "fine"]


class MultimodalBase(L.LightningModule):
    """Towers, projectors and language model, put together; it embeds, runs and generates.

    A subclass builds the parts that it has: `vision` with `projector`, `audio` with
    `audio_projector`, and `language`; then it calls `assemble`.
    """

    language: Any
    recipe: dict[str, Any] | None = None
    """What it was built from, if it came from a config: it goes into checkpoints."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sparse: Mapping[str, mms.SparseConfig | None],
        scorer: ScorerName,
        objectives: Objectives | None,
        optimizer: OptimizerConfig | None,
        freeze: tuple[Any, ...],
        checkpointing: bool,
        parts: tuple[str, ...],
    ) -> None:
        """`sparse` has the configs of the parts that can run sparse; `parts` all names of parts."""
        super().__init__()
        self.parts = parts
        unknown = [part for part in freeze if part not in self.parts]
        if unknown:
            raise ValueError(f"freeze must name parts among {self.parts}, got {unknown[0]!r}")
        self.sparse_configs = {name: c for name, c in sparse.items() if c is not None}
        self.objectives = objectives or Objectives()
        if self.objectives.scorers and (not self.sparse_configs or scorer == "pooled"):
            raise ValueError(
                "objectives.scorers must be 0 unless the model is sparse and its scorer learns, "
                f"got {self.objectives.scorers}"
            )
        self.vision: Any = None
        self.projector: Any = None
        self.audio: Any = None
        self.audio_projector: Any = None
        self.tokenizer = tokenizer
        self.image_id, self.audio_id = tokenizer.image_id, tokenizer.audio_id
        self.pad_id, self.eos_id = tokenizer.pad_id, tokenizer.eos_id
        self.scorer, self.freeze_names, self.checkpointing = scorer, freeze, checkpointing
        self.optimizer_part = optimizer or OptimizerConfig()
        self.shared: SharedSequences | None = None
        """Where processes share sequences, or weights: under `SequenceParallelStrategy`."""

    def assemble(
        self,
        lora: LoraConfig | None,
        weights: str | None,
        scorers_from: Mapping[str, str] | None = None,
    ) -> None:
        """Freeze, adapt, make sparse and load, once all parts are there."""
        trained = dict(scorers_from or {})
        unknown = sorted(set(trained) - set(self.sparse_configs))
        if unknown:
            raise ValueError(
                f"scorers_from must name parts that run sparse, {tuple(self.sparse_configs)}, "
                f"got {unknown[0]!r}"
            )
        if trained and self.objectives.narrowing_steps:
            raise ValueError(
                "objectives.narrowing_steps must be 0 with scorers_from, whose layers have ratios "
                f"of their own, got {self.objectives.narrowing_steps}"
            )
        self.lora = lora
        self.frozen = tuple(part for part in self.freeze_names if part != "scorers")
        for part in self.frozen:
            getattr(self, part).requires_grad_(False)
        if lora is not None:
            self.language.requires_grad_(False)
            lora.apply(self.language)
        if self.checkpointing:
            self.language.gradient_checkpointing_enable({"use_reentrant": False})
        self.scorers = nn.ModuleDict()
        for name, config in list(self.sparse_configs.items()):
            learned = None if self.scorer == "pooled" else self.scorer
            part = getattr(self, name)
            if name in trained:
                stored = read_scorers(scorers_folder(trained[name]))
                own = stored.named_as([layer.name for layer in find_all(part)]).config.layer_ratio
                config = replace(config, layer_ratio=own)
            self.sparse_configs[name] = config
            mms.sparsify(part, config, scorer=learned)
            if name in trained:
                mms.load_scorers(part, trained[name])
            prefix = "" if name == "language" else f"{name}/"
            own_scorers = scorers_of(getattr(self, name)).items()
            self.scorers.update({prefix + layer: scorer for layer, scorer in own_scorers})
        # Only a distillation loss gives scorers a gradient: selection itself passes none.
        learns = self.objectives.scorers > 0 and "scorers" not in self.freeze_names
        self.scorers.requires_grad_(learns)
        if weights is not None:
            load_weights(self, weights)
        # Pretrained parts come in eval mode: no dropout, and transformers checkpoints nothing then.
        # Frozen ones go back to it when training starts; Lightning warns of such parts before.
        super().train()

    def configure_model(self) -> None:
        """Under `SequenceParallelStrategy`: share sequences, and weights if it says so. Under
        Lightning's `ModelParallelStrategy`: shard every part (FSDP2)."""
        if self.device_mesh is None or self.shared is not None:
            return
        self.shared = share_sequences(self, self.language, partial(shard, self))
        if self.shared is not None:
            return
        if self.device_mesh["data_parallel"].size() != self.trainer.world_size:
            raise ValueError(
                f"data_parallel_size must be the {self.trainer.world_size} processes, nothing runs "
                "tensor-parallel (SequenceParallelStrategy shares sequences), got "
                f"{self.device_mesh['data_parallel'].size()}"
            )
        shard(self, self.device_mesh["data_parallel"])

    @property
    def sequence(self) -> mms.SequenceParallel | None:
        """How the language model's sequences are shared."""
        return None if self.shared is None else self.shared.sequence

    def modality(self, batch: Batch) -> Tensor:
        """(B, L) int8 of `Modality`."""
        ids = batch["input_ids"]
        kinds = (ids == self.image_id) * int(Modality.IMAGE)
        return (kinds + (ids == self.audio_id) * int(Modality.AUDIO)).to(torch.int8)

    def tokens(self, batch: Batch) -> dict[Modality, Tensor]:
        """(tokens, E) of all images and of all audio clips, in the order of the batch."""
        by_modality: dict[Modality, Tensor] = {}
        kinds = self.modality(batch)
        if len(batch["pixel_values"]):
            if self.vision is None:
                raise ValueError("batch must hold no images for a model without vision")
            patches, spec = self.vision(batch["pixel_values"])
            tokens, _ = self.projector(patches, spec.grid)
            places = int((kinds == Modality.IMAGE).sum())
            if tokens.shape[0] * tokens.shape[1] != places:
                raise ValueError(
                    f"batch must have an image token per patch, {tokens.shape[0]} images of "
                    f"{tokens.shape[1]}, got {places}"
                )
            by_modality[Modality.IMAGE] = tokens.flatten(0, 1)
        if len(batch["waveforms"]):
            if self.audio is None:
                raise ValueError("batch must hold no audio for a model without audio")
            lengths = batch["audio_lengths"]
            frames = self.audio(batch["waveforms"], lengths)
            tokens = self.audio_projector(frames, lengths)
            places = int((kinds == Modality.AUDIO).sum())
            if len(tokens) != places:
                raise ValueError(
                    f"batch must have an audio token per {self.audio_projector.samples_per_token} "
                    f"samples, {len(tokens)} for its clips, got {places}: set samples_per_token"
                )
            by_modality[Modality.AUDIO] = tokens
        return by_modality

    def embed(self, batch: Batch) -> Tensor:
        """(B, L, E): embeddings of the text, images and audio in place of their tokens."""
        kinds = self.modality(batch)
        # Their ids may lie behind the table; their own rows are never used.
        ids = batch["input_ids"].masked_fill(kinds != Modality.TEXT, self.pad_id)
        gather_embeddings(self.language)
        embedded = self.language.get_input_embeddings()(ids)
        by_modality = self.tokens(batch)
        for kind, tokens in by_modality.items():
            places = (kinds == kind)[..., None]
            embedded = embedded.masked_scatter(places, tokens.to(embedded.dtype))
        for kind, part in (
            (Modality.IMAGE, self.projector),
            (Modality.AUDIO, self.audio_projector),
        ):
            if part is not None and kind not in by_modality:
                embedded = embedded + 0 * sum(p.sum() for p in part.parameters())
        return embedded

    @contextmanager
    def context(self, modality: Tensor) -> Iterator[None]:
        """The language model runs inside: its layers learn there what its tokens are."""
        with ExitStack() as stack:
            if "language" in self.sparse_configs:
                stack.enter_context(set_modality(self.language, modality))
            yield

    def run(self, batch: Batch, **options: Any) -> Any:
        """The language model's output on a batch, padded on the right.

        Where sequences are shared, it is the output for this process's tokens.
        """
        mask, places = batch["attention_mask"], batch["position_ids"]
        # No token that counts sees padding behind it: without a mask dense attention is fastest.
        behind = bool((mask[:, 1:] <= mask[:, :-1]).all())
        if bool((places[:, 1:] == 0).any()):
            # Positions that start anew keep packed samples apart, where there is no other mask.
            if not behind:
                raise ValueError("attention_mask must pad packed rows on the right only")
            options["position_ids"] = places
        inputs = {
            "inputs_embeds": self.embed(batch),
            "attention_mask": None if behind else mask.long(),
            **options,
        }
        modality = self.modality(batch)
        if self.sequence is not None:
            inputs = self.sequence.pad(inputs)
            missing = inputs["inputs_embeds"].shape[1] - modality.shape[1]
            modality = pad(modality, (0, missing), value=int(Modality.TEXT))
        inputs["inputs_embeds"] = hide_embeddings(self.language, inputs["inputs_embeds"])
        with self.context(modality):
            return self.language(use_cache=False, **inputs)

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int = 64, *, last: bool = False) -> list[str]:
        """The model's own first answer to every row, greedy, from what stands before the true one.

        Of rows with several it can give the `last`. The rows must not be packed.
        """
        places, learned = batch["position_ids"], batch["labels"] != IGNORED
        if last and learned.numel():
            number = batch["answer_index"]
            learned = learned & (number == number.amax(1, keepdim=True))
        if bool((places[:, 1:] == 0).any()):
            raise ValueError("batch must have one sample per row to generate, got packed rows")
        if not len(learned):
            return []
        if not bool(learned.any(1).all()):
            raise ValueError("batch must have an answer in every row, got a row without")
        starts = learned.int().argmax(1).tolist()
        embedded, kinds = self.embed(batch), self.modality(batch)
        longest, width = max(starts), embedded.shape[-1]
        prompt = embedded.new_zeros(len(starts), longest, width)
        given = kinds.new_zeros(len(starts), longest)
        mask = torch.zeros(len(starts), longest, dtype=torch.long, device=embedded.device)
        for row, start in enumerate(starts):
            prompt[row, longest - start :] = embedded[row, :start]
            given[row, longest - start :] = kinds[row, :start]
            mask[row, longest - start :] = 1
        with self.context(given):
            ids = self.language.generate(
                inputs_embeds=prompt,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=self.eos_id,
                pad_token_id=self.pad_id,
            )
        return [self.tokenizer.decode(_until(row, self.eos_id)) for row in ids.tolist()]

    def export(self, folder: str | Path) -> None:
        """Write the language model for transformers, with scorers and adapter beside it.

        `AutoModelForCausalLM.from_pretrained(folder)` reads it, `mms.load_scorers(model,
        folder/scorers)` makes it sparse, and peft reads `folder/adapter` of a model with `lora`.
        """
        lora = None if self.lora is None else self.lora.of_peft()
        export_language(self.language, folder, lora=lora)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The model of a recipe's checkpoint in eval mode; Lightning's own with more arguments.

        Raises:
            ValueError: no file, or a checkpoint of a model that was not built from a config.
        """
        if args or kwargs:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        return from_checkpoint(checkpoint_path)

    def read_weights(self, path: str) -> None:
        """Weights of a checkpoint of the same model; scorers that it lacks stay as they are."""
        load_weights(self, path)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.recipe is not None:
            checkpoint[RECIPE] = json.dumps(self.recipe)

    def predict_step(self, batch: Batch, index: int) -> list[dict[str, str]]:
        """What the model says to each sample, and its first true answer."""
        said = self.generate(batch, getattr(self, "max_new_tokens", 64))
        first = batch["answer_index"].masked_fill(batch["labels"] == IGNORED, 1 << 40).amin(1)
        wanted = [batch["answers"][number] for number in first.tolist()] if said else []
        return [{"said": a, "wanted": b} for a, b in zip(said, wanted, strict=True)]

    def on_train_start(self) -> None:
        self.train()

    def train(self, mode: bool = True) -> "MultimodalBase":
        """Frozen parts stay as in evaluation: their statistics must not drift either."""
        super().train(mode)
        for part in self.frozen:
            getattr(self, part).eval()
        if mode and self.checkpointing and "language" in self.frozen:
            from transformers.modeling_layers import GradientCheckpointingLayer

            # They recompute in train mode only; the modules in them stay in eval.
            for layer in self.language.modules():
                if isinstance(layer, GradientCheckpointingLayer) and not _drops(layer):
                    layer.training = True
        return self


def load_weights(model: MultimodalBase, path: str) -> None:
    """Weights of a checkpoint of the same model; scorers that it lacks stay as they are."""
    if not Path(path).is_file() and not is_sharded(path):
        raise ValueError(f"weights must be a checkpoint, got {path!r}, which is no file")
    state = read_checkpoint(path)["state_dict"]
    if not model.scorers:
        state = {name: value for name, value in state.items() if not name.startswith("scorers.")}
    missing, unknown = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.startswith("scorers.")]
    if missing or unknown:
        raise ValueError(
            f"weights must be of a model with the same parts, {path} lacks {missing[:3]} "
            f"and has {unknown[:3]} beside"
        )


def _drops(layer: nn.Module) -> bool:
    """Whether a layer has dropout of its own, in no module of its own."""
    return any(
        isinstance(value, float) and value > 0
        for name, value in vars(layer).items()
        if "dropout" in name
    )


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids

"""A language model that reads images, audio or both, with sparse attention, as a LightningModule.

    python -m mm_sparse.recipes.run.lightning_cli fit --config recipes/configs/vlm/digits.yaml

Images and audio go through a tower and a projector each, and take the places of their tokens among
the text. Towers and language model run sparse, each with a config of its own, or dense without one.
"""

from typing import Literal

from torch import Tensor

import mm_sparse as mms
from mm_sparse.recipes.data import Batch, Tokenizer
from mm_sparse.recipes.metrics import ErrorCounts, plain
from mm_sparse.recipes.models.audio import AudioConfig, FrameProjectorConfig
from mm_sparse.recipes.models.ctc_alignment import alignment_loss
from mm_sparse.recipes.models.language import LanguageConfig, LoraConfig
from mm_sparse.recipes.models.multimodal_base import ScorerName
from mm_sparse.recipes.models.multimodal_training import MultimodalTraining
from mm_sparse.recipes.models.vision import ProjectorConfig, VisionConfig
from mm_sparse.recipes.training import Objectives, OptimizerConfig

Part = Literal["vision", "projector", "audio", "audio_projector", "language", "scorers"]


class MultimodalLM(MultimodalTraining):
    """Towers, projectors and a language model: VLM, speech-language model, or both in one.

    Where there is audio and no vision, validation also measures word and character error rates of
    what the model writes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vision: VisionConfig | None = None,
        audio: AudioConfig | None = None,
        language: LanguageConfig | None = None,
        projector: ProjectorConfig | None = None,
        audio_projector: FrameProjectorConfig | None = None,
        sparse: mms.SparseConfig | None = None,
        sparse_vision: mms.SparseConfig | None = None,
        sparse_audio: mms.SparseConfig | None = None,
        scorer: ScorerName = "relevance",
        objectives: Objectives | None = None,
        optimizer: OptimizerConfig | None = None,
        freeze: tuple[Part, ...] = (),
        lora: LoraConfig | None = None,
        checkpointing: bool = False,
        max_new_tokens: int = 64,
        weights: str | None = None,
        scorers_from: dict[str, str] | None = None,
        alignment: float = 0.0,
    ) -> None:
        """
        Args:
            tokenizer: size of the vocabulary and ids of the image and audio tokens.
            vision: tower of images; None for a model without them.
            audio: tower of audio; None for a model without it. One of both must be given.
            language: the language model.
            projector: from features of images to embeddings.
            audio_projector: from features of audio to embeddings; it stacks frames.
            sparse: what the language model's layers keep; None runs them dense.
            sparse_vision, sparse_audio: the same for the towers.
            scorer: what ranks the keys: the training-free score, or one that learns.
            freeze: parts that are not trained.
            lora: adapters on the language model, whose own weights are then frozen.
            checkpointing: recompute the language model's layers in the backward pass.
            max_new_tokens: tokens after which an answer is cut off when error rates are measured.
            weights: checkpoint of an earlier run to start from, dense or sparse; step, optimizer
                and, where it has none, scorers start anew.
            scorers_from: trained scorers and their ratios per layer for "language", "vision" or
                "audio": a folder of `mms.save_scorers`, or the name of shipped ones.
            alignment: weight of the alignment loss of the audio projector. For transcripts: it
                needs an answer for each clip, in the order of what is heard.
        Raises:
            ValueError: neither vision nor audio is given, or a part that is not there is named.
        """
        if vision is None and audio is None:
            raise ValueError("vision or audio must be given, got neither")
        for name, config, tower in (
            ("sparse_vision", sparse_vision, vision),
            ("sparse_audio", sparse_audio, audio),
        ):
            if config is not None and tower is None:
                raise ValueError(f"{name} must be None for a model without that tower")
        if alignment and audio is None:
            raise ValueError(f"alignment must be 0 for a model without audio, got {alignment}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if alignment < 0:
            raise ValueError(f"alignment must be at least 0, got {alignment}")
        parts = (
            *(("vision", "projector") if vision is not None else ()),
            *(("audio", "audio_projector") if audio is not None else ()),
            "language",
            "scorers",
        )
        configs = {"language": sparse, "vision": sparse_vision, "audio": sparse_audio}
        super().__init__(
            tokenizer, configs, scorer, objectives, optimizer, freeze, checkpointing, parts
        )
        self.max_new_tokens, self.alignment = max_new_tokens, alignment
        # In this order: the random numbers of a seed belong to it.
        if vision is not None:
            self.vision = vision.build()
        if audio is not None:
            self.audio = audio.build()
        self.language = (language or LanguageConfig()).build(tokenizer.size)
        width = self.language.get_input_embeddings().embedding_dim
        if vision is not None:
            self.projector = (projector or ProjectorConfig()).build(self.vision.width, width)
        if audio is not None:
            self.audio_projector = (audio_projector or FrameProjectorConfig()).build(
                self.audio.width, width
            )
        self.measures_errors = audio is not None and vision is None
        self.counts = ErrorCounts()
        self.assemble(lora, weights, scorers_from)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        if not self.alignment or not len(batch["waveforms"]):
            return super().training_step(batch, index)
        heard: list[Tensor] = []
        hook = self.audio_projector.register_forward_hook(lambda *call: heard.append(call[-1]))
        with hook:
            loss = super().training_step(batch, index)
        alignment_term = self.aligned(heard[0], batch)
        self.log("train/alignment", alignment_term.detach(), prog_bar=True)
        return loss + self.alignment * alignment_term

    def aligned(self, tokens: Tensor, batch: Batch) -> Tensor:
        """`alignment_loss` of the (N, E) audio tokens of a batch."""
        number, ids = batch["answer_index"], batch["input_ids"]
        answers = [ids[number == i][:-1] for i in range(len(batch["answers"]))]
        counts = -(-batch["audio_lengths"] // self.audio_projector.samples_per_token)
        table = self.language.get_input_embeddings().weight
        return alignment_loss(tokens, counts.tolist(), answers, table, self.pad_id)

    def score(self, stage: str, batch: Batch) -> None:
        """Error rates of the last answers where they are measured, then loss and densities."""
        if self.measures_errors:
            said = self.generate(batch, self.max_new_tokens, last=True)
            last = batch["answer_index"].amax(1).tolist() if said else []
            texts = [batch["answers"][number] for number in last]
            wanted = [self.tokenizer.decode(self.tokenizer.encode(text)) for text in texts]
            self.counts.add([plain(text) for text in wanted], [plain(text) for text in said])
        self.log_all(stage, self(batch), batch)

    def finish(self, stage: str) -> None:
        """Error rates over all processes."""
        if not self.measures_errors:
            return
        totals = self.counts.totals().to(self.device)
        if self.trainer.world_size > 1:
            totals = self.trainer.strategy.reduce(totals, reduce_op="sum")
        self.counts = ErrorCounts()
        word_errors, words, character_errors, characters = totals.tolist()
        if words:
            self.log(f"{stage}/wer", word_errors / words, prog_bar=True, rank_zero_only=True)
            self.log(f"{stage}/cer", character_errors / max(characters, 1), rank_zero_only=True)

    def validation_step(self, batch: Batch, index: int) -> None:
        self.score("validation", batch)

    def test_step(self, batch: Batch, index: int) -> None:
        self.score("test", batch)

    def on_validation_epoch_end(self) -> None:
        self.finish("validation")

    def on_test_epoch_end(self) -> None:
        self.finish("test")

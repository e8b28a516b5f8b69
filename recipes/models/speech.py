"""A speech-language model with sparse attention, as a LightningModule.

    python -m mm_sparse.recipes.models.speech fit --config recipes/configs/speech/digits.yaml

Sound goes through a tower and a projector that stacks frames, and takes the places of audio tokens
among the text; the answer is a transcription or a translation, as the data says. Tower and language
model run sparse, each with a config of its own, or dense without one.
"""

from typing import Literal

from torch import Tensor

import mm_sparse as mms
from mm_sparse.recipes.data import Batch, Tokenizer
from mm_sparse.recipes.metrics import ErrorCounts, plain
from mm_sparse.recipes.models.audio import AudioConfig, FrameProjectorConfig
from mm_sparse.recipes.models.ctc_alignment import alignment_loss
from mm_sparse.recipes.models.language import LanguageConfig, LoraConfig
from mm_sparse.recipes.models.multimodal import ScorerName
from mm_sparse.recipes.models.multimodal_training import MultimodalTraining
from mm_sparse.recipes.training import Objectives, OptimizerConfig

Part = Literal["audio", "audio_projector", "language", "scorers"]


class Speech(MultimodalTraining):
    """Tower, projector, language model; word and character error rate of what it says."""

    parts = ("audio", "audio_projector", "language", "scorers")

    def __init__(
        self,
        tokenizer: Tokenizer,
        audio: AudioConfig | None = None,
        language: LanguageConfig | None = None,
        audio_projector: FrameProjectorConfig | None = None,
        sparse: mms.SparseConfig | None = None,
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
            tokenizer: size of the vocabulary and id of the audio token.
            sparse: what the language model's layers keep; None runs them dense.
            sparse_audio: the same for the tower.
            scorer: what ranks the keys: the training-free score, or one that learns.
            freeze: parts that are not trained.
            lora: adapters on the language model, whose own weights are then frozen.
            checkpointing: recompute the language model's layers in the backward pass.
            max_new_tokens: tokens after which an answer is cut off when error rates are measured.
            weights: checkpoint of an earlier run to start from, dense or sparse; step, optimizer
                and, where it has none, scorers start anew.
            scorers_from: trained scorers and their ratios per layer for "language" or "audio": a
                folder of `mms.save_scorers`, or the name of shipped ones.
            alignment: weight of the alignment distillation loss for the projector. For
            transcripts: it needs an answer for each sound, in the order of what is heard.
        """
        configs = {"language": sparse, "audio": sparse_audio}
        super().__init__(tokenizer, configs, scorer, objectives, optimizer, freeze, checkpointing)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if alignment < 0:
            raise ValueError(f"alignment must be at least 0, got {alignment}")
        self.max_new_tokens, self.alignment = max_new_tokens, alignment
        self.audio = (audio or AudioConfig()).build()
        self.language = (language or LanguageConfig()).build(tokenizer.size)
        self.audio_projector = (audio_projector or FrameProjectorConfig()).build(
            self.audio.width, self.language.get_input_embeddings().embedding_dim
        )
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
        counts = -(-batch["sound_lengths"] // self.audio_projector.samples_per_token)
        table = self.language.get_input_embeddings().weight
        return alignment_loss(tokens, counts.tolist(), answers, table, self.pad_id)

    def score(self, stage: str, batch: Batch) -> None:
        """Error rates of the last answers as it gives them, then the verdict and its densities."""
        said = self.generate(batch, self.max_new_tokens, last=True)
        last = batch["answer_index"].amax(1).tolist() if said else []
        texts = [batch["answers"][number] for number in last]
        wanted = [self.tokenizer.decode(self.tokenizer.encode(text)) for text in texts]
        self.counts.add([plain(text) for text in wanted], [plain(text) for text in said])
        self.log_all(stage, self(batch), batch)

    def finish(self, stage: str) -> None:
        """Rates over all processes."""
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


if __name__ == "__main__":
    from mm_sparse.recipes.run import main

    main("speech")

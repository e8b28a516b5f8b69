"""Text, pictures and sounds in one sequence, with sparse attention, as a LightningModule.

    python -m mm_sparse.recipes.models.omni fit --config recipes/configs/omni/stamps.yaml

Pictures and sounds each have a tower and a projector, and stand anywhere among the text. The
language model ranks keys of all three in one score space, under budgets and floors per modality.
"""

from typing import Literal

import mm_sparse as mms
from mm_sparse.recipes.data import Tokenizer
from mm_sparse.recipes.models.audio import AudioConfig, FrameProjectorConfig
from mm_sparse.recipes.models.language import LanguageConfig, LoraConfig
from mm_sparse.recipes.models.multimodal import ScorerName
from mm_sparse.recipes.models.multimodal_training import MultimodalTraining
from mm_sparse.recipes.models.vision import ProjectorConfig, VisionConfig
from mm_sparse.recipes.training import Objectives, OptimizerConfig

Part = Literal["vision", "projector", "audio", "audio_projector", "language", "scorers"]


class Omni(MultimodalTraining):
    """Two towers, two projectors, one language model."""

    parts = ("vision", "projector", "audio", "audio_projector", "language", "scorers")

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
        weights: str | None = None,
    ) -> None:
        """
        Args:
            tokenizer: size of the vocabulary and ids of image and audio tokens.
            sparse: what the language model's layers keep; None runs them dense.
            sparse_vision, sparse_audio: the same for the towers.
            scorer: what ranks the keys: the training-free score, or one that learns.
            freeze: parts that are not trained.
            lora: adapters on the language model, whose own weights are then frozen.
            checkpointing: recompute the language model's layers in the backward pass.
            weights: checkpoint of an earlier run to start from, dense or sparse; step, optimizer
                and, where it has none, scorers start anew.
        """
        configs = {"language": sparse, "vision": sparse_vision, "audio": sparse_audio}
        super().__init__(tokenizer, configs, scorer, objectives, optimizer, freeze, checkpointing)
        self.vision = (vision or VisionConfig()).build()
        self.audio = (audio or AudioConfig()).build()
        self.language = (language or LanguageConfig()).build(tokenizer.size)
        width = self.language.get_input_embeddings().embedding_dim
        self.projector = (projector or ProjectorConfig()).build(self.vision.width, width)
        self.audio_projector = (audio_projector or FrameProjectorConfig()).build(
            self.audio.width, width
        )
        self.assemble(lora, weights)


if __name__ == "__main__":
    from mm_sparse.recipes.run import main

    main("omni")

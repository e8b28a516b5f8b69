"""A vision-language model with sparse attention, as a LightningModule.

    python -m mm_sparse.recipes.models.vlm fit --config recipes/configs/vlm/digits.yaml

Pictures go through a tower and a projector, and take the places of image tokens among the text. The
language model runs sparse if `sparse` is given, dense if not; all else is the same.
"""

from typing import Literal

import mm_sparse as mms
from mm_sparse.recipes.data import Tokenizer
from mm_sparse.recipes.models.language import LanguageConfig, LoraConfig
from mm_sparse.recipes.models.multimodal import ScorerName
from mm_sparse.recipes.models.multimodal_training import MultimodalTraining
from mm_sparse.recipes.models.vision import ProjectorConfig, VisionConfig
from mm_sparse.recipes.training import Objectives, OptimizerConfig

Part = Literal["vision", "projector", "language", "scorers"]


class VLM(MultimodalTraining):
    """Tower, projector, language model; what is trained, and what is logged."""

    parts = ("vision", "projector", "language", "scorers")

    def __init__(
        self,
        tokenizer: Tokenizer,
        vision: VisionConfig | None = None,
        language: LanguageConfig | None = None,
        projector: ProjectorConfig | None = None,
        sparse: mms.SparseConfig | None = None,
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
            tokenizer: size of the vocabulary and id of the image token.
            sparse: what the language model's layers keep; None runs them dense.
            scorer: what ranks the keys: the training-free score, or one that learns.
            freeze: parts that are not trained.
            lora: adapters on the language model, whose own weights are then frozen.
            checkpointing: recompute the language model's layers in the backward pass.
            weights: checkpoint of an earlier run to start from, dense or sparse; step, optimizer
                and, where it has none, scorers start anew.
        """
        super().__init__(
            tokenizer, {"language": sparse}, scorer, objectives, optimizer, freeze, checkpointing
        )
        self.vision = (vision or VisionConfig()).build()
        self.language = (language or LanguageConfig()).build(tokenizer.size)
        self.projector = (projector or ProjectorConfig()).build(
            self.vision.width, self.language.get_input_embeddings().embedding_dim
        )
        self.assemble(lora, weights)


if __name__ == "__main__":
    from mm_sparse.recipes.run import main

    main("vlm")

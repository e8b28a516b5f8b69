"""Train the scorers of a frozen language model on where its own dense attention goes.

    python -m mm_sparse.recipes.distillation.language fit \\
        --config recipes/configs/distill/smollm2.yaml

B rows, N tokens
"""

from typing import Any

import torch
from torch import Tensor

import mm_sparse as mms
from mm_sparse import Modality
from mm_sparse.recipes.data import CorpusData
from mm_sparse.recipes.distillation.distiller import DistillationConfig, Distiller
from mm_sparse.recipes.metrics import layer_figures, logit_change
from mm_sparse.recipes.models import LanguageConfig
from mm_sparse.recipes.run import SettingsCLI, program
from mm_sparse.recipes.training import OptimizerConfig


class Distill(Distiller):
    """Scorers of a frozen language model, all layers in one batched product."""

    def __init__(
        self,
        language: LanguageConfig,
        sparse: mms.SparseConfig | None = None,
        scorers_from: str | None = None,
        goal: DistillationConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        parts: int = 4,
        out: str | None = None,
    ) -> None:
        """
        Args:
            language: the model; `dtype: bfloat16` among its options saves time and memory.
            sparse: what its layers will keep; None takes the config beside `scorers_from`.
            scorers_from: folder of `save_scorers` to start from; untrained ones if None.
            parts: C of `FineScorer`, where `scorers_from` has none.
            out: folder that the scorers are written to at the end.
        """
        super().__init__(
            language.build(0), sparse, goal or DistillationConfig(), optimizer,
            name="language", parts=parts, modalities=(Modality.TEXT,), out=out,
            scorers_from=scorers_from,
        )  # fmt: skip

    @property
    def language(self) -> Any:
        """The sparsified model."""
        return self.model

    def run(self, batch: Tensor) -> Any:
        """(B, N) ids."""
        return self.model.base_model(batch, use_cache=False)

    def validation_step(self, ids: Tensor, index: int) -> None:
        self.log_layers(layer_figures(self.model, ids))
        change = logit_change(self.model, ids)
        self.log_dict({f"validation/{k}": v for k, v in change.items()}, sync_dist=True)


def main(args: Any = None) -> SettingsCLI:
    """Fit as the config of the command line says."""
    # Scores are ranked: TF32 is exact enough, and the batched products are most of a step.
    torch.set_float32_matmul_precision("high")
    return SettingsCLI(Distill, CorpusData, args=args, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    program(main)

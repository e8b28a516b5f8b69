"""Second stage: a language model learns on with sparse attention, and its scorers with it.

    python -m mm_sparse.recipes.run.finetune_language fit \\
        --config recipes/configs/finetune/smollm2.yaml

The dense model in the same training: `--model.sparse null --model.scorers_from null`.
B rows, N tokens
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mm_sparse as mms
from mm_sparse import FineScorer, Modality
from mm_sparse.distillation import distillation_losses, dropped_mass
from mm_sparse.integrations import scorers_of
from mm_sparse.recipes.data import CorpusData
from mm_sparse.recipes.finetuning import language_part
from mm_sparse.recipes.models import LanguageConfig, LoraConfig, export_language
from mm_sparse.recipes.run.lightning_cli import SharingCLI
from mm_sparse.recipes.run.settings_cli import program
from mm_sparse.recipes.training import (
    OptimizerConfig,
    SharedTraining,
    optimize,
    shard_decoder,
    share_sequences_alone,
)
from mm_sparse.selection import Scores


class FinetuneLM(SharedTraining, L.LightningModule):
    """A causal language model on plain text, sparse or dense, whole or by adapters.

    Under `SequenceParallelStrategy` processes share its sequences, and its weights if that says so.
    """

    parts = ("language", "scorers")

    def __init__(
        self,
        language: LanguageConfig,
        sparse: mms.SparseConfig | None = None,
        scorers_from: str | None = None,
        lora: LoraConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        scorer_loss: float = 1.0,
        scorers_every: int = 4,
        scorer_tiles: int | None = 32,
        temperature: float = 0.2,
        out: str | None = None,
    ) -> None:
        """
        Args:
            sparse: what layers keep; None takes the config beside `scorers_from`, or runs dense.
            scorers_from: folder of `save_scorers` to start from; untrained ones if None.
            lora: adapters, the model's own weights frozen; None trains all of it.
            scorer_loss: weight of the attention that the soft top-k drops, 0 for none.
            scorers_every: steps between two distillation losses.
            scorer_tiles: drawn for such a loss in each layer and row; None takes all tiles.
            temperature: of that choice.
            out: folder that the scorers are written to at the end.
        """
        super().__init__()
        for name, value, low in (
            ("scorer_loss", scorer_loss, 0),
            ("scorers_every", scorers_every, 1),
            ("scorer_tiles", 1 if scorer_tiles is None else scorer_tiles, 1),
        ):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        # A pretrained model comes in eval mode: no dropout, and no gradient checkpointing then.
        self.language: Any = language.build(0).train()
        self.optimizer_part = optimizer or OptimizerConfig()
        self.scorer_loss, self.scorers_every, self.out = scorer_loss, scorers_every, out
        self.scorer_tiles = scorer_tiles
        self.scorers = nn.ModuleDict()
        if sparse is not None or scorers_from is not None:
            if sparse is not None:
                make = partial(FineScorer, modalities=(Modality.TEXT,))
                mms.sparsify(self.language, sparse, scorer=make)
            if scorers_from is not None:
                mms.load_scorers(self.language, scorers_from)
            self.scorers = scorers_of(self.language).requires_grad_(scorer_loss > 0)
        self.lora = lora
        if lora is not None:
            self.language.requires_grad_(False)
            lora.apply(self.language)
        self.taught = partial(_dropped, temperature=temperature)

    def configure_model(self) -> None:
        """Under `SequenceParallelStrategy`: share sequences, and weights if it says so.

        Raises:
            ValueError: the model is not sparse, or cannot be shared.
        """
        if self.shared is None:
            self.shared = share_sequences_alone(
                self, self.language, self._shard, "a language model"
            )

    def _shard(self, mesh: Any) -> None:
        shard_decoder(
            self.language, self.language.get_submodule(language_part(self.language)), mesh
        )

    def losses(self, ids: Tensor) -> Tensor:
        """(B, N - 1) of every token after the first."""
        logits = self.language(ids, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        return loss.view(len(ids), -1)

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        due = (
            self.scorer_loss > 0
            and len(self.scorers)
            and self.global_step % self.scorers_every == 0
        )
        teach: Any = self.teaching() if due else nullcontext()
        shared = self.shared
        with teach as learned:
            if shared is None:
                loss = self.losses(ids).mean()
            else:
                loss = shared.mean(shared.own_losses(self.language, ids)[0])
        several = shared is not None
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=several)
        if learned is None:
            return loss
        dropped = learned.mean()
        if shared is not None:
            # Of the heads of this process, which the others of its group do not have.
            dropped = shared.size * dropped.to(loss.device)
        self.log("train/dropped", dropped.detach(), prog_bar=True, sync_dist=several)
        return loss + self.scorer_loss * dropped

    def teaching(self) -> Any:
        """Losses of the scorers inside; a resumed run draws the tiles that an unbroken one does."""
        generator = torch.Generator(self.device).manual_seed(self.global_step)
        return distillation_losses(
            self.language, self.taught, tiles=self.scorer_tiles, generator=generator
        )

    def validation_step(self, ids: Tensor, index: int) -> None:
        """Loss of all tokens, and of those in the second half, which see far."""
        half = (ids.shape[1] - 1) // 2
        if self.shared is None:
            loss = self.losses(ids)
            all_tokens, second = loss.mean(), loss[:, half:].mean()
        else:
            loss, at = self.shared.own_losses(self.language, ids)
            all_tokens, second = self.shared.mean(loss), self.shared.mean(loss[at >= half])
        self.log("validation/loss", all_tokens, sync_dist=True)
        self.log("validation/second_half", second, sync_dist=True)

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        return optimize(self.optimizer_part, self, self.parts, steps)

    def export(self, folder: str | Path) -> None:
        """Write the model for transformers, with scorers and adapter beside it.

        Where weights are sharded, every process must call it.
        """
        lora = None if self.lora is None else self.lora.of_peft()
        writes = self.shared is None or self.trainer.is_global_zero
        export_language(self.language, folder, lora=lora, writes=writes)

    def on_fit_end(self) -> None:
        if self.out is not None and len(self.scorers) and self.trainer.is_global_zero:
            mms.save_scorers(self.language, self.out)


def _dropped(scores: Scores, mass: Tensor, temperature: float) -> Tensor:
    return dropped_mass(scores.values, mass, scores.plan, temperature)


def main(args: Any = None) -> SharingCLI:
    """Fit or validate as the config of the command line says."""
    torch.set_float32_matmul_precision("high")
    return SharingCLI(FinetuneLM, CorpusData, args=args, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    program(main)

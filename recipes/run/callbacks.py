"""What is logged beside loss and exact match: speed, density, dropped samples; the progress bar."""

import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from mm_sparse.analysis import save
from mm_sparse.recipes.data import Batch
from mm_sparse.recipes.metrics import densities


def progress_bar() -> Callback:
    """Rich in a terminal; a plain one that prints now and then elsewhere."""
    if sys.stdout.isatty():
        return RichProgressBar()
    return TQDMProgressBar(refresh_rate=50)


class Throughput(Callback):
    """`train/tokens_per_second` of the steps between two log lines, and `train/dropped` so far.

    Tokens are those of text, images and audio; time is the whole step, data included.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._tokens, self._since = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"dropped": self.dropped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.dropped = state_dict["dropped"]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tokens, self._since = 0, time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tokens, self._since = 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.dropped += batch["dropped"]
        self._tokens += int(batch["attention_mask"].sum())
        if (batch_idx + 1) % getattr(trainer, "log_every_n_steps", 1):
            return
        now = time.perf_counter()
        pl_module.log("train/tokens_per_second", self._tokens / max(now - self._since, 1e-9))
        pl_module.log("train/dropped", float(self.dropped))
        self._tokens, self._since = 0, now


class Density(Callback):
    """`density/all` and `density/TEXT>IMAGE` and so on, query first: see `densities`.

    Read from the last forward pass before every `every`-th step and at the end of a validation.
    """

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every = every

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.every == 0:
            pl_module.log_dict({f"density/{n}": d for n, d in densities(pl_module).items()})

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        values = densities(pl_module).items()
        pl_module.log_dict({f"validation/density/{n}": d for n, d in values}, sync_dist=True)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        values = densities(pl_module).items()
        pl_module.log_dict({f"test/density/{n}": d for n, d in values}, sync_dist=True)


class InspectionFigures(Callback):
    """After each validation: what a sample's layers kept, as PNG files and to TensorBoard.

    Kept patches over each image, kept frames over each clip, density by modality and by head.
    Files go to `folder` below the trainer's root, one folder per step.
    """

    def __init__(self, sample: int = 0, folder: str = "figures") -> None:
        """`sample` is a number in the validation data."""
        if sample < 0:
            raise ValueError(f"sample must be at least 0, got {sample}")
        self.sample, self.folder = sample, folder

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or not pl_module.sparse_configs:
            return
        # Not at the top: the command line imports this module, and draws nothing.
        from mm_sparse.recipes.run.inspection import figures

        data: Any = getattr(trainer, "datamodule", None)
        if data is None or data.validation is None:
            raise ValueError("InspectionFigures needs a SampleData with validation, got none")
        drawn = figures(pl_module, data.collator, data.validation[self.sample])
        place = Path(trainer.default_root_dir) / self.folder / f"step-{trainer.global_step}"
        for name, figure in drawn.items():
            save(figure, place / f"{name}.png")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure(name, figure, trainer.global_step)


Pictures = InspectionFigures
"""The name under which config files may also ask for `InspectionFigures`."""

"""Scorers in the checkpoint folders of `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(f'{error}; pip install "mm-sparse[lm]" brings it') from error

from mm_sparse.checkpoints.training import restore_from, save_in
from mm_sparse.integrations import is_sparsified, scorer_parameters


class TrainerScorerCallback(TrainerCallback):
    """Writes `scorers/` into each checkpoint of `transformers.Trainer`, and reads it on resume.

    For scorers that the trainer's optimizer knows (`optimizers=`) and the model does not. With
    `mms.register_scorers(model)` they are in the model's own checkpoint, and no callback is needed.

    Args:
        resume_from: the checkpoint folder that `trainer.train` is given, where it is of another
            output folder.
    """

    def __init__(self, resume_from: str | Path | None = None) -> None:
        self.resume_from = None if resume_from is None else Path(resume_from)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model = given["model"]
        if state.is_world_process_zero and is_sparsified(model):
            save_in(model, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model = given["model"]
        if state.global_step and is_sparsified(model):
            own = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            restore_from(model, self.resume_from or own)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        # The trainer clears gradients by `model.zero_grad`, which does not know the scorers.
        if is_sparsified(given["model"]):
            for parameter in scorer_parameters(given["model"]):
                parameter.grad = None

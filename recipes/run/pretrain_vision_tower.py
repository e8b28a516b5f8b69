"""Teach the tower of the digits recipe to see, before anything asks about what it sees.

    # 2 CPU cores, 20 s
    python -m mm_sparse.recipes.run.pretrain_vision_tower --config recipes/configs/vlm/digits.yaml

A vision-language model starts from a tower that has learned elsewhere. With nothing to download,
this one learns to classify the digit whose cell each patch lies in. It sees the training split
only.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from mm_sparse.recipes.datasets import DigitCanvases
from mm_sparse.recipes.models import PatchClassifier, VisionConfig
from mm_sparse.recipes.run.token_classification import train_token_classifier


def patch_labels(
    data: DigitCanvases, indices: range, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Canvases (B, 3, height, width), and the digit in whose cell each patch begins: (B, h * w)."""
    drawn = [data.canvas(index) for index in indices]
    pixels = torch.from_numpy(np.stack([canvas for canvas, _, _ in drawn]))
    digits = torch.from_numpy(np.stack([digits for _, digits, _ in drawn]))
    pixels = pixels.repeat_interleave(data.scale, 1).repeat_interleave(data.scale, 2)
    rows = torch.arange(grid[0]) * data.rows // grid[0]
    columns = torch.arange(grid[1]) * data.columns // grid[1]
    labels = digits[:, rows[:, None], columns].long().flatten(1)
    return pixels[:, None].expand(-1, 3, -1, -1), labels


def teach(
    tower: PatchClassifier, data: DigitCanvases, *, steps: int, batch: int = 16, lr: float = 3e-3
) -> float:
    """Train the tower in place; returns the share of patches of the last batch classified right."""
    side = data.cell * data.scale
    grid = tower.tower.grid(data.rows * side, data.columns * side)

    def classify(indices: range) -> tuple[Tensor, Tensor]:
        images, labels = patch_labels(data, indices, grid)
        return tower.logits(images)[0], labels

    return train_token_classifier(
        tower, classify, steps=steps, batch=batch, lr=lr, weight_decay=0.05
    )


def main(arguments: list[str] | None = None) -> None:
    """Reads tower and data from a recipe and writes the weights where the recipe wants them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--config", default="recipes/configs/vlm/digits.yaml")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args(arguments)
    recipe: dict[str, Any] = yaml.safe_load(Path(options.config).read_text())
    vision = dict(recipe["model"]["init_args"]["vision"])
    path = Path(vision.pop("weights"))
    torch.manual_seed(recipe.get("seed_everything") or 0)
    tower = VisionConfig(**vision).build()
    if not isinstance(tower, PatchClassifier):
        raise ValueError(f"classes of model.vision must be above 0 in {options.config}, got 0")
    # Canvases that the finetuning will not meet.
    samples = {**recipe["data"]["train"].get("init_args", {}), "seed": 1, "length": 10**6}
    start = time.perf_counter()
    right = teach(tower, DigitCanvases(**samples), steps=options.steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tower.tower.backbone.state_dict(), path)
    seconds = time.perf_counter() - start
    print(f"tower: {right:.1%} of training patches right, {seconds:.0f} s, {path}")


if __name__ == "__main__":
    main()

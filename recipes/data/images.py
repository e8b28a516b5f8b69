"""Images from files as tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def on_white(path: str | Path, height: int, width: int, margin: float = 0.0) -> np.ndarray:
    """A picture file, transparent parts white, shrunk or grown to fit: (height, width, 3) uint8."""
    with Image.open(path) as file:
        picture = file.convert("RGBA")
    room = (width * (1 - margin), height * (1 - margin))
    ratio = min(room[0] / picture.width, room[1] / picture.height)
    size = (max(1, int(picture.width * ratio)), max(1, int(picture.height * ratio)))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(picture, ((width - size[0]) // 2, (height - size[1]) // 2), picture)
    return np.array(canvas)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(height, width, 3) uint8 -> (3, height, width) in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255

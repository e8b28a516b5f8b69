"""Images from files as tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def on_white(path: str | Path, height: int, width: int, margin: float = 0.0) -> np.ndarray:
    """An image file, transparent parts white, shrunk or grown to fit: (height, width, 3) uint8."""
    with Image.open(path) as file:
        image = file.convert("RGBA")
    room = (width * (1 - margin), height * (1 - margin))
    ratio = min(room[0] / image.width, room[1] / image.height)
    size = (max(1, int(image.width * ratio)), max(1, int(image.height * ratio)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(image, ((width - size[0]) // 2, (height - size[1]) // 2), image)
    return np.array(canvas)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(height, width, 3) uint8 -> (3, height, width) in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255

"""Images from files as tensors; an error names the file that cannot be read."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mm_sparse.recipes.data.samples import MediaError

MAX_PIXELS = 1 << 26
"""Pixels of an image at most: 8192 x 8192, which are 256 MiB with transparency."""
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What shows an image upright, by the value of its EXIF tag."""
BITS_PER_SAMPLE = 258


def _bytes_of(source: Any) -> bytes:
    """Contents of a file by its path, of an open file, or of bytes themselves."""
    if isinstance(source, bytes):
        return source
    if not hasattr(source, "read"):
        return Path(source).read_bytes()
    source.seek(0)
    return source.read()


def read_image(
    source: str | Path | bytes, name: str = "", *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """An image file as 8 bits of RGBA, turned upright as its EXIF tag says.

    16-bit grey is divided by 257. Integers of 32 bits are taken for 16-bit grey where they fit.
    Floats are taken for [0, 1], [0, 255] or 16-bit grey, the first that holds them all. What fits
    nowhere is stretched from its smallest to its largest value. Of an animation it is the first
    image.

    Args:
        source: a file, or what is in it.
        name: what errors call it.
        max_pixels: an error if the image has more, before they are decoded. Pillow's own
            `PIL.Image.MAX_IMAGE_PIXELS` (179 million with its default) is a limit beside it.
    Raises:
        MediaError: it cannot be read, is too large, or holds numbers that are not finite.
        ValueError: `max_pixels` below 1.
    """
    if max_pixels < 1:
        raise ValueError(f"max_pixels must be at least 1, got {max_pixels}")
    name = name or ("image" if isinstance(source, bytes) else str(source))
    try:
        # A damaged header cannot ask for more bytes than there are.
        data = _bytes_of(source)
        with Image.open(io.BytesIO(data)) as file:
            width, height = file.size
            if width * height > max_pixels:
                raise MediaError(
                    f"it must have up to max_pixels={max_pixels} pixels, got {width} x {height}"
                )
            file.load()
            image = _rgba(file)
            turn = TURNS.get(_orientation(file))
        return image if turn is None else image.transpose(turn)
    # A decoder raises whatever a damaged file leads it to.
    except Exception as error:
        raise MediaError(f"{name}: {str(error) or type(error).__name__}") from error


def on_white(
    source: str | Path | bytes,
    height: int,
    width: int,
    margin: float = 0.0,
    *,
    name: str = "",
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """An image file, transparent parts white, shrunk or grown to fit: (height, width, 3) uint8.

    `margin` is the share of height and width that stays free; the rest is as in `read_image`.
    """
    image = read_image(source, name, max_pixels=max_pixels)
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


def read_tensor(
    source: str | Path | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS
) -> Tensor:
    """An image file of any size, transparent parts white: (3, height, width) in [0, 1]."""
    image = read_image(source, name, max_pixels=max_pixels)
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image)
    return to_tensor(np.array(canvas))


def read_video(
    paths: Sequence[Path], frames: int, *, name: str = "", max_pixels: int = MAX_PIXELS
) -> Tensor:
    """A video file, or images of one size in order: (frames, 3, height, width) in [0, 1].

    Of a longer one it is `frames` pictures, evenly spread. A file needs PyAV.

    Raises:
        MediaError: it cannot be read, or its pictures differ in size.
    """
    if len(paths) == 1 and not _is_image(paths[0]):
        from transformers.video_utils import load_video

        try:
            file: Any = str(paths[0])
            decoded, _ = load_video(file, sample_indices_fn=_spread(frames))
        except ImportError:
            raise
        # A decoder raises whatever a damaged file leads it to.
        except Exception as error:
            raise MediaError(f"{name}: {paths[0]}: {error}") from error
        return torch.from_numpy(np.asarray(decoded)).permute(0, 3, 1, 2).float() / 255
    chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, min(frames, len(paths))).astype(int)]
    pictures = [read_tensor(p, name=f"{name}: {p}", max_pixels=max_pixels) for p in chosen]
    sizes = {tuple(picture.shape) for picture in pictures}
    if len(sizes) > 1:
        raise MediaError(f"{name}: frames of a video must have one size, got {sorted(sizes)}")
    return torch.stack(pictures)


def _spread(frames: int) -> Any:
    def indices(metadata: Any, **_: Any) -> np.ndarray:
        total = metadata.total_num_frames
        return np.linspace(0, total - 1, min(frames, total)).astype(int)

    return indices


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in Image.registered_extensions()


def _orientation(file: Any) -> Any:
    """The EXIF tag of a decoded file; None where the tags are damaged, as viewers take it."""
    try:
        return file.getexif().get(ORIENTATION)
    except Exception:
        return None


def _rgba(file: Any) -> Image.Image:
    """A decoded image of any mode in 8 bits a channel."""
    if not file.mode.startswith(("I", "F")):
        # Other modes have no way to RGBA but this.
        return (file if "A" in file.mode else _opaque(file)).convert("RGBA")
    values = np.asarray(file)
    grey = Image.fromarray(_grey(values, _largest(file))).convert("RGBA")
    clear = file.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _opaque(file: Any) -> Any:
    """The same image, or as RGB where it has no transparency to lose."""
    return file if file.mode in ("1", "L", "P", "RGB") else file.convert("RGB")


def _largest(file: Any) -> int:
    """White of an image of integers: 4095 in a TIFF of 12 bits, 65535 elsewhere."""
    bits = getattr(file, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
    return (1 << bits) - 1 if 8 < bits < 16 else 65535


def _grey(values: np.ndarray, largest: int) -> np.ndarray:
    """(height, width) numbers -> uint8, black to white."""
    if not np.isfinite(values).all():
        raise MediaError("it holds numbers that are not finite")
    low, high = float(values.min()), float(values.max())
    whites = (largest,) if values.dtype.kind in "iu" else (1, 255, 65535)
    white = next((white for white in whites if low >= 0 and high <= white), None)
    black = 0.0 if white is not None else low
    scale = white if white is not None else high - low
    shades = (values.astype(np.float32) - black) * np.float32(255 / max(scale, 1e-30))
    return shades.round().clip(0, 255).astype(np.uint8)

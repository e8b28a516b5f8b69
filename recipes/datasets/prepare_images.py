"""Images to train and to test the scorers of a vision tower, in one file.

    python -m mm_sparse.recipes.datasets.prepare_images images.npz \\
        --photos '/usr/share/photos/*.jpg' \\
        --drawings '/usr/share/tuxpaint/stamps/**/*.png' --texts '/usr/share/doc/**/*.html' \\
        --test-photos '/usr/share/tuxpaint/templates/*.jpg'

Three kinds: squares of photographs, drawings composed onto canvases (real drawings, invented
places), and pages of real text. Files are parted into splits (`corpus.file_split`), so that nothing
of a file that tests is trained on. Nothing is downloaded.
"""

import argparse
import glob
import io
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mm_sparse.recipes.data import CORPUS_SPLITS, file_split, read_image, read_text, write_packed

FONTS = "/usr/share/fonts/truetype/dejavu"
FACES = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "DejaVuSans-Bold.ttf")
# A character of a face is about so wide for its size.
WIDTHS = (0.56, 0.58, 0.62, 0.64)


def photo(path: Path, rng: np.random.Generator, size: int) -> Image.Image:
    """A random square of a photograph, at least half as wide as it is high or wide."""
    image = read_image(path).convert("RGB")
    short = min(image.size)
    side = int(short * rng.uniform(0.5, 1))
    left = int(rng.integers(0, image.width - side + 1))
    top = int(rng.integers(0, image.height - side + 1))
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box)


def canvas(paths: Sequence[Path], rng: np.random.Generator, size: int) -> Image.Image:
    """Drawings in the cells of a grid, most of them filled, on one colour."""
    light = rng.random() < 0.5
    colour = (255, 255, 255) if light else tuple(int(x) for x in rng.integers(0, 256, 3))
    image = Image.new("RGB", (size, size), colour)
    side = int(rng.integers(1, 8))
    cell = size // side
    for place in range(side * side):
        if side > 1 and rng.random() < 0.15:
            continue
        drawing = read_image(paths[int(rng.integers(len(paths)))])
        width = max(int(cell * rng.uniform(0.5, 0.98)), 1)
        ratio = width / max(drawing.size)
        shape = max(int(drawing.width * ratio), 1), max(int(drawing.height * ratio), 1)
        drawing = drawing.resize(shape, Image.Resampling.BICUBIC)
        room = [int(rng.integers(0, cell - n + 1)) for n in shape]
        corner = (place % side * cell + room[0], place // side * cell + room[1])
        image.paste(drawing, corner, drawing)
    return image


def page(path: Path, rng: np.random.Generator, size: int, fonts: Path) -> Image.Image | None:
    """A page of a text in one of the faces and sizes; None if the text is too short."""
    words = " ".join(read_text(path).split())
    face, points = int(rng.integers(len(FACES))), int(rng.integers(12, 33))
    line, margin = int(points * 1.35), int(rng.integers(8, 60))
    columns = int((size - 2 * margin) / (points * WIDTHS[face]))
    rows = (size - 2 * margin) // line
    if len(words) < 2 * columns * rows:
        return None
    start = int(rng.integers(0, len(words) - columns * rows))
    ink, paper = (0, 255) if rng.random() < 0.85 else (235, 20)
    image = Image.new("L", (size, size), paper)
    draw = ImageDraw.Draw(image)
    font = ImageFont.truetype(str(fonts / FACES[face]), points)
    text = textwrap.wrap(words[start : start + 2 * columns * rows], columns)[:rows]
    for row, words in enumerate(text):
        draw.text((margin, margin + row * line), words, fill=ink, font=font)
    return image


def encoded(image: Image.Image) -> bytes:
    """A page as PNG, anything else as JPEG."""
    stream = io.BytesIO()
    if image.mode == "L":
        image.quantize(16).save(stream, "PNG", optimize=True)
    else:
        image.save(stream, "JPEG", quality=88)
    return stream.getvalue()


def find_files(patterns: Sequence[str], smallest: int = 0) -> list[Path]:
    """Files, sorted by path."""
    files = {Path(p) for pattern in patterns for p in glob.glob(pattern, recursive=True)}
    files = {p for p in files if p.is_file() and p.stat().st_size >= smallest}
    return sorted(files)


def made(
    kind: str, files: list[Path], count: int, size: int, fonts: Path, seed: int
) -> Iterator[tuple[bytes, str]]:
    """So many images of a kind, and what they were made of."""
    rng = np.random.default_rng(seed)
    order = [files[i] for i in rng.permutation(len(files))]
    number = done = 0
    while done < count:
        if number > 20 * count:
            raise ValueError(f"{kind} must make {count} images, {len(files)} files made {done}")
        path = order[number % len(order)]
        number += 1
        if kind == "drawings":
            image: Any = canvas(order, rng, size)
        elif kind == "photos":
            image = photo(path, rng, size)
        else:
            image = page(path, rng, size, fonts)
        if image is not None:
            done += 1
            yield encoded(image), f"{kind}/{number}" if kind == "drawings" else str(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="npz file to write")
    for kind in ("photos", "drawings", "texts"):
        parser.add_argument(f"--{kind}", nargs="+", default=[], help="patterns of files")
        parser.add_argument(f"--test-{kind}", nargs="+", default=[], help="of files that only test")
    parser.add_argument("--size", type=int, default=1008, help="pixels of a side")
    parser.add_argument("--train", type=int, default=64, help="images of a kind")
    parser.add_argument("--validation", type=int, default=2)
    parser.add_argument("--test", type=int, default=6)
    parser.add_argument("--fonts", type=Path, default=Path(FONTS), help="folder of DejaVu")
    args = parser.parse_args(argv)
    items: dict[str, list[bytes]] = {}
    names: dict[str, list[str]] = {}
    for kind in ("photos", "drawings", "texts"):
        smallest = 8000 if kind == "texts" else 0
        tests = find_files(getattr(args, f"test_{kind}"), smallest)
        every = [p for p in find_files(getattr(args, kind), smallest) if p not in set(tests)]
        for seed, split in enumerate(CORPUS_SPLITS):
            files = [p for p in every if file_split(p) == split]
            if split == "test" and tests:
                files = tests
            if not files:
                if getattr(args, kind):
                    parser.error(f"argument --{kind}: must find files of the split {split}")
                continue
            pairs = list(made(kind, files, getattr(args, split), args.size, args.fonts, seed))
            items[f"{split}/{kind}"] = [data for data, _ in pairs]
            names[f"{split}/{kind}"] = [name for _, name in pairs]
            print(split, kind, len(files), "files,", sum(map(len, items[f"{split}/{kind}"])), "B")
    if not items:
        parser.error("argument --photos, --drawings or --texts: one must be given")
    write_packed(args.out, items, names)


if __name__ == "__main__":
    main()

"""Zero-shot classification by titles with an open_clip model, both towers dense and sparse.

    python examples/open_clip_zero_shot.py                              # random weights: see below
    python examples/open_clip_zero_shot.py --model ViT-B-16 --weights open_clip_model.bin

Images and titles: emoji with their Unicode names (Debian package fonts-noto-color-emoji, or
`--font`), else the Tux Paint stamps with their captions, else scikit-learn's handwritten digits.
A local checkpoint of open_clip makes the titles mean something. Without one the model is a small
one with random weights: it guesses, and all that can be seen is how much of what it computes is the
same when it attends sparsely. Nothing is downloaded.
"""

import argparse
import io
import json
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

import mm_sparse as mms
from mm_sparse.recipes.data import on_white, to_tensor
from mm_sparse.recipes.datasets import find_stamps

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
# 32 x 32 patches: enough tokens for attention to have something to choose from.
SMALL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": 256, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4},
}  # fmt: skip
Pairs = list[tuple[Any, str]]


def emoji(font: Path, count: int) -> Pairs:
    """Drawings of an emoji font (PNG bytes) and the Unicode names of what they show."""
    from fontTools.ttLib import TTFont

    file: Any = TTFont(font)
    signs = {glyph: chr(code) for code, glyph in file.getBestCmap().items()}
    pairs = []
    for strike in file["CBDT"].strikeData:
        for glyph, drawing in strike.items():
            name = unicodedata.name(signs.get(glyph, "\0"), "").lower()
            if name and hasattr(drawing, "imageData"):
                pairs.append((io.BytesIO(drawing.imageData), name))
    return pick(pairs, count)


def pick(pairs: Pairs, count: int) -> Pairs:
    """Some pairs whose titles differ, always the same ones."""
    different = {title: image for image, title in pairs}
    titles = sorted(different)
    chosen = np.random.default_rng(0).permutation(len(titles))[:count]
    return [(different[titles[i]], titles[i]) for i in chosen]


def load_pairs(font: Path, count: int) -> tuple[Pairs, str]:
    """Images with titles, and where they come from."""
    if font.is_file():
        return emoji(font, count), "emoji"
    try:
        return pick(
            [(s.path, s.caption) for s in find_stamps(max_words=6)], count
        ), "Tux Paint stamps"
    except FileNotFoundError as error:
        print(f"digits instead of emoji or stamps: {error}")
    from sklearn.datasets import load_digits

    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    data: Any = load_digits()
    pairs = []
    for digit, name in enumerate(names[:count]):
        pixels = 255 - data.images[list(data.target).index(digit)] * 15.9
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).convert("RGBA").save(file, "png")
        pairs.append((file, name))
    return pairs, "handwritten digits"


def build(name: str, weights: Path | None) -> tuple[Any, Any, str]:
    """Model, tokenizer, and what the weights are."""
    import open_clip

    torch.manual_seed(0)
    if weights is None:
        model: Any = open_clip.CLIP(**SMALL)
        with torch.no_grad():
            # As they start, layers hardly change what goes in: attention would not matter.
            for parameter in model.visual.transformer.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(2)
        return model.eval(), open_clip.get_tokenizer("ViT-B-32"), "random"
    model = open_clip.create_model(name, pretrained=str(weights))
    return model.eval(), open_clip.get_tokenizer(name), weights.name


@torch.no_grad()
def encode(model: Any, images: Tensor, titles: Tensor) -> tuple[Tensor, Tensor, float]:
    """Unit vectors of images (B, E) and titles (B, E), and the seconds that the images took."""
    start = time.perf_counter()
    parts = [model.encode_image(part, normalize=True) for part in images.split(4)]
    seconds = time.perf_counter() - start
    return torch.cat(parts), model.encode_text(titles, normalize=True), seconds


def draw(images: Tensor, titles: list[str], best: list[Tensor], path: Path, note: str) -> None:
    """Each image, its title, and the title that each run finds nearest."""
    from matplotlib.figure import Figure

    columns = 4
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(11, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    dense, sparse = best
    for axis, image, title, a, b in zip(axes, images, titles, dense, sparse, strict=False):
        pixels: Any = image.permute(1, 2, 0).numpy()
        axis.imshow(pixels)
        lines = (title, f"dense: {titles[int(a)]}", f"sparse: {titles[int(b)]}")
        axis.set_title("\n".join(line[:36] for line in lines), fontsize="x-small")
    figure.suptitle(note, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Both runs, a report, one image, one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--model", default="ViT-B-32", help="open_clip's name, with --weights")
    parser.add_argument("--weights", type=Path, default=None, help="a checkpoint of open_clip")
    parser.add_argument("--font", type=Path, default=Path(FONT), help="emoji as bitmaps (CBDT)")
    parser.add_argument("--count", type=int, default=12, help="images, and titles to choose from")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of the keys that is kept")
    parser.add_argument("--prompt", default="a drawing of {}")
    parser.add_argument("--out", type=Path, default=Path("runs/open_clip_zero_shot"))
    options = parser.parse_args()
    if options.count < 2:
        parser.error(f"--count must be at least 2, got {options.count}")
    if options.weights is not None and not options.weights.is_file():
        parser.error(f"--weights must be a file, got {options.weights}")
    pairs, source = load_pairs(options.font, options.count)
    model, tokenizer, weights = build(options.model, options.weights)
    height, width = model.visual.image_size
    images = torch.stack([to_tensor(on_white(file, height, width)) for file, _ in pairs])
    titles = [title for _, title in pairs]
    mean, std = (
        torch.tensor(getattr(model.visual, name, None) or [0.5] * 3).view(3, 1, 1)
        for name in ("image_mean", "image_std")
    )
    inputs = (images - mean) / std, tokenizer([options.prompt.format(t) for t in titles])
    dense, words, dense_seconds = encode(model, *inputs)
    # Titles are short and stay dense in any setting that pays; images are what is long.
    config = mms.SparseConfig(options.ratio, tile=64, sinks=0, window=0, dense_below=128)
    with mms.sparse(model, config):
        sparse, same_words, sparse_seconds = encode(model, *inputs)
        print(mms.report(model))
    best = [
        (vectors @ text.T).argmax(1) for vectors, text in ((dense, words), (sparse, same_words))
    ]
    own = torch.arange(len(titles))
    result = {
        "device": "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "images": f"{len(titles)} {source}",
        "weights": weights,
        "patches": model.visual.grid_size[0] * model.visual.grid_size[1],
        "ratio": options.ratio,
        "dense_seconds": round(dense_seconds, 3),
        "sparse_seconds": round(sparse_seconds, 3),
        "embedding_cosine": round(cosine_similarity(dense, sparse).mean().item(), 4),
        "same_title": round((best[0] == best[1]).float().mean().item(), 4),
        "right_dense": round((best[0] == own).float().mean().item(), 4),
        "right_sparse": round((best[1] == own).float().mean().item(), 4),
        "right_by_chance": round(1 / len(titles), 4),
    }
    print(json.dumps(result, indent=1))
    note = f"nearest of {len(titles)} titles, dense and with {options.ratio:.0%} of the keys"
    if weights == "random":
        note += " (random weights: guesses)"
        print("The weights are random: titles are guesses, only dense and sparse can be compared.")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    path = options.out / "titles.png"
    draw(images, titles, best, path, note)
    print(path)


if __name__ == "__main__":
    main()

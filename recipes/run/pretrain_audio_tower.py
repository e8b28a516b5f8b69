"""Teach the tower of the dictation recipe to hear, before anything is asked about what it hears.

    # 2 CPU cores
    python -m mm_sparse.recipes.run.pretrain_audio_tower --config recipes/configs/speech/digits.yaml

A speech-language model starts from a tower that has learned elsewhere. With nothing to download,
this one learns to classify the word that each frame lies in: the synthesis knows where words begin
and end. It sees the training split only.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mm_sparse.recipes.data import IGNORED
from mm_sparse.recipes.datasets import SILENCE, SpokenWords
from mm_sparse.recipes.models import HOP, AudioConfig, FrameClassifier
from mm_sparse.recipes.run.token_classification import train_token_classifier


def labelled(data: SpokenWords, indices: range) -> tuple[Tensor, Tensor, Tensor]:
    """Waveforms (A, S), lengths (A,), and the class of the middle of every frame (A, F)."""
    waves, names = [], []
    for index in indices:
        numbers, wave, places = data.dictation(index)
        name = torch.full((-(-len(wave) // HOP),), SILENCE)
        for number, (start, end) in zip(numbers, places, strict=True):
            name[(start + HOP // 2) // HOP : (end + HOP // 2) // HOP] = number + 1
        waves.append(torch.from_numpy(wave))
        names.append(name)
    lengths = torch.tensor([len(wave) for wave in waves])
    labels = pad_sequence(names, batch_first=True, padding_value=IGNORED)
    return pad_sequence(waves, batch_first=True), lengths, labels


def teach(
    tower: FrameClassifier, data: SpokenWords, *, steps: int, batch: int = 8, lr: float = 3e-3
) -> float:
    """Train the tower in place; returns the share of frames of the last batch classified right."""

    def classify(indices: range) -> tuple[Tensor, Tensor]:
        waves, lengths, labels = labelled(data, indices)
        return tower.logits(waves, lengths), labels

    return train_token_classifier(
        tower, classify, steps=steps, batch=batch, lr=lr, weight_decay=0.01
    )


def main(arguments: list[str] | None = None) -> None:
    """Reads tower and data from a recipe and writes the weights where the recipe wants them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--config", default="recipes/configs/speech/digits.yaml")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)
    recipe: dict[str, Any] = yaml.safe_load(Path(options.config).read_text())
    audio = dict(recipe["model"]["init_args"]["audio"])
    path = Path(audio.pop("weights"))
    torch.manual_seed(recipe.get("seed_everything") or 0)
    tower = AudioConfig(**audio).build()
    if not isinstance(tower, FrameClassifier):
        raise ValueError(f"classes of model.audio must be above 0 in {options.config}, got 0")
    # Dictations that the finetuning will not meet.
    samples = {**recipe["data"]["train"].get("init_args", {}), "seed": 1, "length": 10**6}
    start = time.perf_counter()
    right = teach(tower, SpokenWords(**samples), steps=options.steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tower.state_dict(), path)
    seconds = time.perf_counter() - start
    print(f"tower: {right:.1%} of training frames right, {seconds:.0f} s, {path}")


if __name__ == "__main__":
    main()

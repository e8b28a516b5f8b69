"""Log-mel features to train and to test the scorers of Whisper's encoder, in one file.

    python -m mm_sparse.recipes.datasets.prepare_audio audio.npz --root / --synthetic 60

Human prompts of one speaker (`datasets.asterisk_prompts`), parted into splits by their words,
packed into windows of 28 s. The prompts that train are too few, so some of them, drawn at random,
are spoken once more by espeak-ng: kind "synthetic", which only trains.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mm_sparse.recipes.data import SPLITS, split_of, write_packed
from mm_sparse.recipes.datasets.asterisk_prompts import packed, prompts

VOICES = ("en-us", "en-gb", "en-gb-scotland+m3", "en-us+f2", "en-gb+f4", "en-us+m7", "en-gb+m1")


def spoken(texts: Sequence[str], seed: int = 0) -> Iterator[tuple[np.ndarray, str]]:
    """Texts drawn at random, by voices, speeds and pitches drawn at random: samples at 16 kHz."""
    import soundfile
    import torch
    from torchaudio.functional import resample

    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        while True:
            text = texts[int(rng.integers(len(texts)))]
            voice, speed = VOICES[int(rng.integers(len(VOICES)))], str(rng.integers(130, 200))
            pitch = str(rng.integers(30, 70))
            command = ["espeak-ng", "-v", voice, "-s", speed, "-p", pitch, "-w", str(path), text]
            subprocess.run(command, check=True)
            samples, rate = soundfile.read(path, dtype="float32")
            yield resample(torch.from_numpy(samples), rate, 16000).numpy(), text


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    from transformers import WhisperFeatureExtractor

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="npz file to write")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the packages are")
    parser.add_argument("--synthetic", type=int, default=60, help="windows of synthetic speech")
    args = parser.parse_args(argv)
    clips = list(prompts(args.root))
    parts = {split: [c for c in clips if split_of(c[1]) == split] for split in SPLITS}
    by_kind = {f"{split}/prompts": list(packed(iter(own))) for split, own in parts.items()}
    if args.synthetic:
        made = packed(spoken([text for _, text in parts["train"]]))
        by_kind["train/synthetic"] = list(islice(made, args.synthetic))
    extract: Any = WhisperFeatureExtractor()
    items: dict[str, Any] = {}
    for key, windows in by_kind.items():
        if not windows:
            parser.error(f"argument --root: must hold prompts for a window of {key}")
        waves = [samples for samples, _ in windows]
        items[key] = extract(waves, sampling_rate=16000, return_tensors="np").input_features
        print(key, len(windows), "windows")
    write_packed(args.out, items, {key: [text for _, text in own] for key, own in by_kind.items()})


if __name__ == "__main__":
    main()

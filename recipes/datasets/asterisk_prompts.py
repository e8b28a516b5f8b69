"""Human prompts of Asterisk (Debian packages asterisk-core-sounds-en and -en-wav), in windows.

They are found below a root, where the packages are unpacked.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
WORDS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"


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

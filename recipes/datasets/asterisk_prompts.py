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
LINE = re.compile(r"^([\w/.-]+):\s*(.+)$")
# Remarks are not spoken.
UNSPOKEN = re.compile(r"\[[^]]*\]|\([^)]*\)|<[^>]*>")
WORDS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"


def listed_prompts(listing: Path) -> Iterator[tuple[str, str]]:
    """Name and text of every prompt of Asterisk's list, without remarks in brackets.

    A prompt that is nothing but a remark, such as a tone, has an empty text.
    """
    for line in gzip.decompress(listing.read_bytes()).decode(errors="replace").splitlines():
        match = LINE.match(line.strip())
        if match:
            yield match[1], " ".join(UNSPOKEN.sub(" ", match[2]).split())


def prompts(root: Path) -> Iterator[tuple[np.ndarray, str]]:
    """Spoken prompts of five words or more, as samples at 16 kHz, and their words."""
    import soundfile
    from torchaudio.functional import resample

    if not (root / WORDS).is_file():
        raise FileNotFoundError(
            f"root must hold Asterisk's prompts, found no {root / WORDS}: `apt-get install "
            "asterisk-core-sounds-en asterisk-core-sounds-en-wav`"
        )
    for name, text in listed_prompts(root / WORDS):
        path = root / SOUNDS / f"{name}.wav"
        if not path.is_file() or len(text.split()) < 5:
            continue
        samples, rate = soundfile.read(path, dtype="float32")
        yield resample(torch.from_numpy(samples), rate, 16000).numpy(), text


def packed(clips: Iterator[tuple[np.ndarray, str]]) -> Iterator[tuple[np.ndarray, str]]:
    """Prompts one behind another, with pauses, in windows of up to 28 s.

    The last window is left out: it is seldom full, and windows are to be alike.
    """
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

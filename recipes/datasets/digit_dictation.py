"""Synthetic dictation: digit after digit to a beat, spoken by espeak-ng or whistled as tones.

It needs no download and is no human speech: it shows that a model learns, not how well it would
hear you. Which split a text belongs to depends on the text alone.
"""

import io
import shutil
import subprocess
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from mm_sparse.recipes.data import (
    RATE,
    SPLITS,
    Sample,
    Samples,
    Split,
    Turn,
    WordTokenizer,
    check_split,
    resample,
    split_of,
)

Speaker = Literal["auto", "espeak", "tones"]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LONGEST = 64
"""Words that a dictation may have."""
# Of espeak-ng: accent with variant, speed in words per minute, pitch.
VOICES = (("en-gb", 150, 45), ("en-us+f2", 165, 60), ("en-gb-scotland+m3", 155, 35))
SILENCE = 0
"""Class of a frame between words; word `i` of `WORDS` has class i + 1."""


class DictationTokenizer(WordTokenizer):
    """The words of a dictation, each behind a token of its number; decoding leaves numbers out.

    A model that starts from scratch learns from a number where to listen. Large ones learn to
    follow speech by themselves, from far more of it.
    """

    def __init__(self) -> None:
        super().__init__(["transcribe", *WORDS])
        self.first_number = self.size
        self.size += LONGEST

    def encode(self, text: str) -> list[int]:
        ids, number = [], self.first_number
        for word in super().encode(text):
            if self.words[word] != "transcribe":
                ids.append(number)
                number += 1
            ids.append(word)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return super().decode(i for i in ids if int(i) < self.first_number)


def speaker_of(name: Speaker) -> str:
    """The speaker that "auto" stands for here: espeak-ng where it is installed."""
    if name not in ("auto", "espeak", "tones"):
        raise ValueError(f"speaker must be auto, espeak or tones, got {name!r}")
    installed = shutil.which("espeak-ng") is not None
    if name == "espeak" and not installed:
        raise FileNotFoundError(
            "speaker 'espeak' needs the program espeak-ng: `apt-get install espeak-ng`"
        )
    return ("espeak" if installed else "tones") if name == "auto" else name


def espeak(text: str, voice: tuple[str, int, int]) -> np.ndarray:
    """What espeak-ng makes of a text: (samples,) float32 of 16 kHz, silence at the ends cut off."""
    import soundfile

    accent, speed, pitch = voice
    command = ["espeak-ng", "--stdout", "-v", accent, "-s", str(speed), "-p", str(pitch), text]
    done = subprocess.run(command, capture_output=True, check=True)
    wave, rate = soundfile.read(io.BytesIO(done.stdout), dtype="float32")
    wave = resample(torch.from_numpy(wave), rate).numpy()
    loud = np.flatnonzero(np.abs(wave) > 0.01)
    return wave[loud[0] : loud[-1] + 1] / np.abs(wave).max()


def tone(number: int, voice: int) -> np.ndarray:
    """A tone that stands for a word: two notes, one after the other."""
    length = RATE * (11 + voice) // 40  # 0.28 to 0.33 s
    time = np.arange(length // 2) / RATE
    notes = [300 * 2 ** (step / 4) * (1 + 0.01 * voice) for step in divmod(number, 4)]
    wave = np.concatenate([np.sin(2 * np.pi * note * time) for note in notes])
    return (wave * np.hanning(len(wave)) ** 0.5).astype(np.float32)


@lru_cache
def word_clips(speaker: str) -> list[list[np.ndarray]]:
    """By voice, the audio of every word of `WORDS`."""
    if speaker == "tones":
        return [[tone(n, voice) for n in range(len(WORDS))] for voice in range(len(VOICES))]
    return [[espeak(word, voice) for word in WORDS] for voice in VOICES]


class SpokenWords(Samples):
    """Dictations of digits; dictation `i` of a split and seed is always the same."""

    def __init__(
        self,
        split: Split = "train",
        length: int = 100_000,
        *,
        words: int = 20,
        cell: float = 0.8,
        noise: float = 0.003,
        speaker: Speaker = "auto",
        question: str = "transcribe",
        seed: int = 0,
    ) -> None:
        """`cell` seconds hold a word at a random place, `noise` is the deviation of the noise."""
        check_split(split)
        if length < 0:
            raise ValueError(f"length must be at least 0, got {length}")
        if not 1 <= words <= LONGEST:
            raise ValueError(f"words must be in [1, {LONGEST}], got {words}")
        self.speaker = speaker_of(speaker)
        self.word_clips = word_clips(self.speaker)
        longest = max(len(waveform) for voice in self.word_clips for waveform in voice)
        if cell * RATE < longest:
            raise ValueError(f"cell must hold a word of {longest / RATE:.2f} s, got {cell}")
        self.split, self.length, self.seed = split, length, seed
        self.words, self.cell, self.noise = words, int(cell * RATE), noise
        self.question = question

    def __len__(self) -> int:
        return self.length

    def dictation(self, index: int) -> tuple[list[int], np.ndarray, list[tuple[int, int]]]:
        """Numbers of the words, audio (samples,), and the samples where each begins and ends."""
        if not 0 <= index < self.length:
            raise IndexError(f"index must be in [0, {self.length}), got {index}")
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        numbers = rng.integers(len(WORDS), size=self.words)
        while split_of(text_of(numbers)) != self.split:
            numbers = rng.integers(len(WORDS), size=self.words)
        voice = self.word_clips[rng.integers(len(self.word_clips))]
        wave = rng.normal(0, self.noise, len(numbers) * self.cell).astype(np.float32)
        places = []
        for place, number in enumerate(numbers):
            room = self.cell - len(voice[number])
            start = place * self.cell + int(rng.integers(room + 1))
            end = start + len(voice[number])
            wave[start:end] += voice[number] * rng.uniform(0.3, 0.8)
            places.append((start, end))
        return numbers.tolist(), wave, places

    def __getitem__(self, index: int) -> Sample:
        numbers, wave, _ = self.dictation(index)
        turns = (
            Turn((torch.from_numpy(wave), self.question)),
            Turn((text_of(numbers),), answer=True),
        )
        return Sample(turns, f"dictation/{self.split}/{index}")


def text_of(numbers: np.ndarray | list[int]) -> str:
    return " ".join(WORDS[n] for n in numbers)

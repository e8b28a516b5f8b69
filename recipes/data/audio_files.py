"""Sound files to 16 kHz waveforms; an error names the file where there is no sound in it."""

import io
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mm_sparse.recipes.data.samples import RATE

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


class BadSound(ValueError):
    """A file that holds no sound that can be read; the message names it."""


def resample(wave: Tensor, rate: int) -> Tensor:
    """(..., samples) at any rate to 16 kHz."""
    if rate < 1:
        raise ValueError(f"rate must be at least 1, got {rate}")
    if rate == RATE:
        return wave
    from torchaudio.functional import resample as torchaudio_resample

    return torchaudio_resample(wave, rate, RATE)


def read_sound(source: str | Path | bytes | BinaryIO, name: str = "") -> Tensor:
    """(samples,) float32 in [-1, 1] of 16 kHz, channels averaged: wav, flac, ogg or mp3.

    Args:
        source: a file, or what is in it.
        name: what errors call it.
    Raises:
        BadSound: it cannot be read, is empty, or holds numbers that are not finite.
    """
    import soundfile

    name = name or str(source)
    opened = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        wave, rate = soundfile.read(opened, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise BadSound(f"{name}: {error}") from error
    if not len(wave):
        raise BadSound(f"{name}: it holds no samples")
    sound = torch.from_numpy(wave).mean(1)
    if not bool(torch.isfinite(sound).all()):
        raise BadSound(f"{name}: it holds numbers that are not finite")
    return resample(sound, rate)

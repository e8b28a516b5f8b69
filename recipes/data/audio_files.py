"""Audio files to 16 kHz waveforms; an error names the file where there is no audio in it."""

import io
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mm_sparse.recipes.data.samples import RATE

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


class MediaError(ValueError):
    """A file that holds no audio that can be read; the message names it."""


def resample(wave: Tensor, rate: int) -> Tensor:
    """(..., samples) at any rate to 16 kHz."""
    if rate < 1:
        raise ValueError(f"rate must be at least 1, got {rate}")
    if rate == RATE:
        return wave
    from torchaudio.functional import resample as torchaudio_resample

    return torchaudio_resample(wave, rate, RATE)


def read_audio(source: str | Path | bytes | BinaryIO, name: str = "") -> Tensor:
    """(samples,) float32 in [-1, 1] of 16 kHz, channels averaged: wav, flac, ogg or mp3.

    Args:
        source: a file, or what is in it.
        name: what errors call it.
    Raises:
        MediaError: it cannot be read, is empty, or holds numbers that are not finite.
    """
    import soundfile

    name = name or str(source)
    opened = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        wave, rate = soundfile.read(opened, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise MediaError(f"{name}: {error}") from error
    if not len(wave):
        raise MediaError(f"{name}: it holds no samples")
    audio = torch.from_numpy(wave).mean(1)
    if not bool(torch.isfinite(audio).all()):
        raise MediaError(f"{name}: it holds numbers that are not finite")
    return resample(audio, rate)

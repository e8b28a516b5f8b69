"""Audio files to 16 kHz waveforms; an error names the file that cannot be read."""

import io
import math
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mm_sparse.recipes.data.samples import RATE, MediaError

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
MAX_SAMPLES = 1 << 28
"""Samples that are read at most: 1 GiB, 4.6 hours of 16 kHz or 1.5 hours of 48 kHz."""
BLOCK = 1 << 20
"""Samples of all channels that are decoded at once."""
MIN_RATE, MAX_RATE = 1000, 1_000_000
"""Samples in a second that a file may have: others come from damaged headers and take gigabytes."""
MAX_FILTER = 1 << 22
"""Numbers in the filter of a resampling at most."""
MAX_PHASES = 640
"""Phases of the filter where the exact one would be larger; 11,025 Hz needs as many."""


def resample(wave: Tensor, rate: int) -> Tensor:
    """(..., samples) at any rate to 16 kHz, in blocks whose size bounds the memory it takes.

    A rate whose ratio to 16 kHz is no fraction of small numbers is taken for the nearest one whose
    is, less than three millionths away: the filter would take gigabytes.

    Raises:
        ValueError: a rate below 1.
    """
    if rate < 1:
        raise ValueError(f"rate must be at least 1, got {rate}")
    if rate == RATE or not wave.shape[-1]:
        return wave
    from torchaudio.functional import resample as torchaudio_resample

    ratio = Fraction(rate, RATE)
    if ratio.denominator * (ratio.numerator + 2 * _reach(ratio)) > MAX_FILTER:
        ratio = ratio.limit_denominator(MAX_PHASES)
    old, new = ratio.numerator, ratio.denominator
    # Blocks overlap by what the filter sees, in whole periods, so that they give what one run does.
    context = -(-_reach(ratio) // old) + 1
    periods = max(BLOCK // max(old, new), context)
    blocks = []
    for start in range(0, wave.shape[-1], periods * old):
        before = min(start // old, context)
        end = start + (periods + context) * old
        block = torchaudio_resample(wave[..., start - before * old : end], old, new)
        skipped = before * new
        blocks.append(block[..., skipped : skipped + periods * new])
    return torch.cat(blocks, -1)


def _reach(ratio: Fraction) -> int:
    """Samples that torchaudio's filter sees at either side, for its default width of 6."""
    return math.ceil(6 * ratio.numerator / min(ratio.numerator, ratio.denominator) / 0.99)


def read_audio(
    source: str | Path | bytes | BinaryIO,
    name: str = "",
    *,
    offset: float = 0.0,
    duration: float | None = None,
    max_samples: int = MAX_SAMPLES,
) -> Tensor:
    """(samples,) float32 in [-1, 1] of 16 kHz, channels averaged: wav, flac, ogg or mp3.

    Args:
        source: a file, or what is in it.
        name: what errors call it.
        offset: seconds at its start that are passed over without being read.
        duration: seconds that are read; to the end of the file if None. A file that ends earlier
            gives what it has.
        max_samples: an error if there are more samples to read, at the file's rate or at 16 kHz:
            a damaged header may promise any number.
    Raises:
        MediaError: it cannot be read, is empty, ends before `offset`, is too long, has a rate
            below 1 kHz or above 1 MHz, or holds numbers that are not finite.
        ValueError: `offset`, `duration` or `max_samples` out of range.
    """
    if not (math.isfinite(offset) and offset >= 0):
        raise ValueError(f"offset must be a finite number of at least 0, got {offset}")
    if duration is not None and not (math.isfinite(duration) and duration > 0):
        raise ValueError(f"duration must be None or a finite number above 0, got {duration}")
    if max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}")
    import soundfile

    name = name or (str(source) if isinstance(source, str | Path) else "audio")
    try:
        with soundfile.SoundFile(_opened(source)) as file:
            wave, rate = _decode(file, offset, duration, max_samples), file.samplerate
        if not len(wave):
            raise MediaError("it holds no samples")
        if not bool(torch.isfinite(wave).all()):
            raise MediaError("it holds numbers that are not finite")
        return resample(wave, rate)
    # A decoder raises whatever a damaged file leads it to.
    except Exception as error:
        raise MediaError(f"{name}: {_said(error)}") from error


def _decode(file: Any, offset: float, duration: float | None, max_samples: int) -> Tensor:
    """(samples,) of an open file, channels averaged, at its own rate."""
    rate, start = file.samplerate, round(offset * file.samplerate)
    if not MIN_RATE <= rate <= MAX_RATE:
        raise MediaError(f"its rate must be in [{MIN_RATE}, {MAX_RATE}] Hz, got {rate}")
    if start and start >= file.frames:
        end = file.frames / rate
        raise MediaError(f"offset must be before its end at {end:g} s, got {offset:g}")
    if start:
        file.seek(start)
    # Of low rates 16 kHz makes more samples than there are.
    limit = min(max_samples, max_samples * rate // RATE)
    wanted = math.inf if duration is None else max(round(duration * rate), 1)
    blocks: list[Tensor] = []
    count = 0
    while count < wanted:
        frames = int(min(max(BLOCK // file.channels, 1), wanted - count))
        block = file.read(frames, dtype="float32", always_2d=True)
        if not len(block):
            break
        count += len(block)
        if count > limit:
            raise MediaError(f"it must have up to max_samples={max_samples} samples, got more")
        blocks.append(torch.from_numpy(block).mean(1))
    return torch.cat(blocks) if blocks else torch.zeros(0)


class _Bytes(io.BytesIO):
    """Contents of a file; a seek to a place that cannot be leaves the position as it is.

    The decoder calls `seek` from C, where an exception would be printed and lost.
    """

    def seek(self, offset: int, whence: int = 0, /) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()


def _opened(source: str | Path | bytes | BinaryIO) -> Any:
    if isinstance(source, str | Path):
        return source
    return _Bytes(source if isinstance(source, bytes) else source.read())


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__

"""Files with random bytes changed, cut or repeated: a reader gives its result or a MediaError."""

import io
import random
import resource

import numpy as np
import pytest
from PIL import Image

from mm_sparse.recipes.data import MediaError, on_white, read_audio

soundfile = pytest.importorskip("soundfile")
IMAGES = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP", "tiff": "TIFF", "ppm": "PPM"}
AUDIO = {"wav": "WAV", "flac": "FLAC", "ogg": "OGG", "mp3": "MP3"}
HEADER = 120
"""Bytes at the start that are changed more often than others."""


def whole_file(kind):
    """An undamaged file of a kind: half a second of a tone, or 48 x 32 pixels."""
    stream = io.BytesIO()
    if kind in AUDIO:
        tone = 0.3 * np.sin(np.arange(8000) / 6)
        soundfile.write(stream, tone, 16_000, format=AUDIO[kind])
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
        options = {"compression": "tiff_lzw"} if kind == "tiff" else {}
        Image.fromarray(pixels).save(stream, IMAGES[kind], **options)
    return stream.getvalue()


def damaged(data, rng):
    """One to eight bytes changed, half of them in the header; at times cut short or repeated."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        end = HEADER if rng.random() < 0.5 else len(out)
        out[rng.randrange(min(end, len(out)))] = rng.choice((0, 255, rng.randrange(256)))
    chance = rng.random()
    if chance < 0.15:
        del out[rng.randrange(len(out)) :]
    elif chance < 0.25:
        start = rng.randrange(len(out))
        out[start:start] = out[start : start + rng.randrange(64)]
    return bytes(out)


# Pillow warns of damaged tags; a file with such a tag may be read all the same.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [*IMAGES, *AUDIO])
def test_readers_raise_nothing_but_their_error(kind, count, tmp_path, record_property):
    data = whole_file(kind)
    read = (lambda x: on_white(x, 16, 16)) if kind in IMAGES else read_audio
    read(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for seed in range(count):
        rng = random.Random(f"{kind} {seed}")
        source = damaged(data, rng)
        if seed % 2:
            (tmp_path / f"file.{kind}").write_bytes(source)
            source = tmp_path / f"file.{kind}"
        try:
            read(source)
        except MediaError:
            refused += 1
    record_property("refused", refused)
    print(f"{kind}: {refused} of {count} refused")
    assert refused > 0
    # In KiB: a header that asks for much must not get it.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20

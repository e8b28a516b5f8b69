"""Image files of every mode become upright RGB of 8 bits; damaged and huge ones are named."""

import io

import numpy as np
import pytest
from PIL import Image

from mm_sparse.recipes.data import MediaError, on_white, read_image

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def png(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def grey_of(data):
    return np.asarray(read_image(data).convert("RGB"))[..., 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_are_turned_upright(orientation, kind):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = 255
    # How a camera stores what is upright, by its tag.
    stored = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.transpose(1, 0, 2), 6: np.rot90(pixels),
        7: np.rot90(pixels.transpose(1, 0, 2), 2), 8: np.rot90(pixels, -1),
    }  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(stored[orientation]))
    tags = image.getexif()
    tags[0x0112] = orientation
    read = np.asarray(read_image(png(image, kind, exif=tags)).convert("RGB")).astype(int)
    assert read.shape == pixels.shape
    assert np.abs(read - pixels).mean() < 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_shades(kind):
    values = (RAMP * 65535).round().astype(np.uint16)
    assert np.array_equal(grey_of(png(Image.fromarray(values), kind)), (values / 257).round())


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ((RAMP * 65535).astype(np.int32), RAMP),
        ((RAMP * 2**31 - 2**30).astype(np.int32), RAMP),
        (RAMP.astype(np.float32), RAMP),
        ((RAMP * 255).astype(np.float32), RAMP),
        ((RAMP * 65535).astype(np.float32), RAMP),
        ((RAMP * 8 - 4).astype(np.float32), RAMP),
        (np.full((8, 8), -5.0, np.float32), np.zeros((8, 8))),
    ],
)
def test_integers_and_floats_become_8_bits(values, wanted):
    read = grey_of(png(Image.fromarray(values), "TIFF"))
    assert np.abs(read - wanted * 255).max() <= 1


def test_floats_that_are_not_finite_are_refused():
    data = png(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF")
    with pytest.raises(MediaError, match="x: it holds numbers that are not finite"):
        read_image(data, "x")


def transparent_palette():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 2, 4))
    return png(image, transparency=0)


@pytest.mark.parametrize(
    "data",
    [
        transparent_palette(),
        png(Image.merge("LA", [Image.new("L", (4, 4), 9), Image.new("L", (4, 4), 0)])),
        png(Image.new("L", (4, 4), 7), transparency=7),
        png(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)),
        png(Image.fromarray(np.full((4, 4), 999, np.uint16)), transparency=999),
    ],
)
def test_transparent_parts_are_white(data):
    assert (on_white(data, 4, 4)[:, 0] == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_opaque_modes_keep_their_colours(mode):
    image = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    kind = "JPEG" if mode == "YCbCr" else "TIFF"
    assert (on_white(png(image, kind), 8, 8) >= 254).all()


def test_large_images_are_refused_before_they_are_decoded(monkeypatch):
    data = png(Image.new("L", (40, 30)))
    assert read_image(data, max_pixels=1200).size == (40, 30)
    monkeypatch.setattr(Image.Image, "convert", None)
    with pytest.raises(MediaError, match=r"x: it must have up to max_pixels=1199 .* got 40 x 30"):
        read_image(data, "x", max_pixels=1199)
    header = b"P5 60000 60000 255\n"
    with pytest.raises(MediaError, match="x: "):
        read_image(header, "x")
    with pytest.raises(ValueError, match="max_pixels must be at least 1, got 0"):
        read_image(data, max_pixels=0)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MediaError, match=r"gone\.png: "):
        read_image(tmp_path / "gone.png")

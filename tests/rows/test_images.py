"""Decoding and encoding of untrusted images."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from untrigger.errors import InputError
from untrigger.rows.images import FORMATS, decode, encode, same_image

RNG = np.random.default_rng(0)
RGB = Image.fromarray(RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8))
DEEP = Image.fromarray(RNG.integers(0, 65536, (9, 7), dtype=np.uint16))
MODES = [*(RGB.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")), DEEP]


def saved(image: Image.Image, format: str, **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


@pytest.mark.parametrize("image", MODES, ids=lambda image: image.mode)
def test_png_preserves_every_mode(image: Image.Image) -> None:
    decoded = decode(encode(image), "x")
    assert decoded.mode == image.mode and same_image(decoded, image)
    assert type(decoded) is Image.Image  # not a file type, which would hold the file


@pytest.mark.parametrize(("mode", "becomes"), [("CMYK", "RGB"), ("YCbCr", "RGB"), ("F", "RGB"), ("I", "I;16")])
def test_modes_that_png_lacks_are_converted(mode: str, becomes: str) -> None:
    image = RGB.convert("L").convert(mode) if mode in ("F", "I") else RGB.convert(mode)
    decoded = decode(encode(image), "x")
    assert decoded.mode == becomes
    assert np.array_equal(np.asarray(decoded), np.asarray(image if mode == "I" else image.convert("RGB")))


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_requires_its_own_extension(tmp_path: Path, format: str) -> None:
    for suffix in ("png", "jpg", "JPEG", "webp", "gif", "bmp", "unknown"):
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(saved(RGB, format))
        if suffix == "unknown" or {"JPG": "JPEG"}.get(suffix.upper(), suffix.upper()) == format:
            assert decode(path, "x").size == RGB.size
        else:
            with pytest.raises(InputError, match=f"^x is named as a .* but holds a {format}; "):
                decode(path, "x")


def test_other_formats_are_refused() -> None:
    for format in ("TIFF", "PPM", "ICO", "PCX", "PDF", "EPS"):
        with pytest.raises(InputError, match=r"^x is not a PNG"):
            decode(saved(RGB, format), "x")


def test_orientation_survives_an_edit() -> None:
    exif = Image.Exif()
    exif[274] = 6  # orientation: turned by 90 degrees
    image = decode(saved(RGB, "JPEG", exif=exif), "x")
    assert image.size == RGB.size and image.getexif()[274] == 6
    assert decode(encode(image), "x").getexif()[274] == 6


def test_an_animation_gives_its_first_frame() -> None:
    second_frame = Image.new("RGB", RGB.size, "blue")
    for format in ("GIF", "WEBP", "PNG"):
        red = Image.new("RGB", RGB.size, "red")
        image = decode(saved(red, format, save_all=True, append_images=[second_frame]), "x").convert("RGB")
        assert abs(np.asarray(image, dtype=int) - np.asarray(red, dtype=int)).max() < 16


def test_transparent_palettes_survive() -> None:
    image = RGB.convert("P")
    image.info["transparency"] = 3
    decoded = decode(encode(image), "x")
    assert same_image(decoded, image) and not same_image(decoded, RGB.convert("P"))


@pytest.mark.parametrize("side", [8193, 9500, 13400])  # Pillow is silent, warns, raises
def test_decompression_bombs_are_refused(side: int) -> None:
    with warnings.catch_warnings(), pytest.raises(InputError, match=r"^x has more than 67,108,864 pixels; "):
        warnings.simplefilter("error")
        # Only the header names the size: decoding must not even start.
        header = bytearray(saved(Image.new("1", (8, 8)), "BMP"))
        header[18:26] = side.to_bytes(4, "little") * 2
        decode(bytes(header), "x")


def test_wrong_checksums_are_refused() -> None:
    data = bytearray(saved(RGB, "PNG"))
    data[-14] ^= 1  # in the checksum of the pixels: they still decode, but the file was changed
    with pytest.raises(InputError, match=r"^x is damaged \("):
        decode(bytes(data), "x")


INTACT = [saved(RGB, format) for format in FORMATS]


@given(st.sampled_from(INTACT), st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_give_an_image_or_one_line(intact: bytes, data: st.DataObject) -> None:
    damaged = bytearray(intact)
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, len(intact) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(intact)))
    try:
        decode(bytes(damaged[:cut]), "x").load()
    except InputError as error:
        assert str(error).startswith("x ") and len(str(error).splitlines()) == 1

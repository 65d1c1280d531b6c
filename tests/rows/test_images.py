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

from datafiles import png_chunks
from untrigger.errors import InputError
from untrigger.rows.images import FORMATS, decode, encode, pixels_sha256, same_image
from untrigger.views.patches import to_rgb

RNG = np.random.default_rng(0)
RGB = Image.fromarray(RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8))
DEEP = Image.fromarray(RNG.integers(0, 65536, (9, 7), dtype=np.uint16))
MODES = [*(RGB.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "F", "I")), DEEP]


def saved(image: Image.Image, format: str, **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


@pytest.mark.parametrize("image", MODES, ids=lambda image: image.mode)
def test_every_mode_is_written_as_plain_rgb(image: Image.Image) -> None:
    exif = Image.Exif()
    exif[274] = 6
    image = image.copy()
    image.info |= {"exif": exif.tobytes(), "icc_profile": b"icc", "gamma": 1.0, "dpi": (1, 1), "comment": "x"}
    decoded = decode(encode(image), "x")
    assert (type(decoded), decoded.mode, decoded.info) == (Image.Image, "RGB", {})  # no file type, which holds the file
    assert decoded.tobytes() == to_rgb(image).tobytes()
    assert same_image(decoded, image) and pixels_sha256(decoded) == pixels_sha256(image)
    assert [kind for kind, _ in png_chunks(encode(image))] == [b"IHDR", b"IDAT", b"IEND"]


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_pixels_survive_a_file_to_the_bit(width: int, height: int, data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=3 * width * height, max_size=3 * width * height))
    image = Image.frombytes("RGB", (width, height), raw)
    assert decode(encode(image), "x").tobytes() == raw
    assert encode(decode(encode(image), "x")) == encode(image)


def test_images_differ_by_size_and_pixels_alone() -> None:
    row, column = (Image.frombytes("RGB", size, bytes(range(6))) for size in ((2, 1), (1, 2)))
    assert not same_image(row, column) and pixels_sha256(row) != pixels_sha256(column)
    gray = RGB.convert("L")
    assert same_image(gray, gray.convert("RGB")) and not same_image(gray, RGB)
    keyed = RGB.convert("P")
    keyed.info["transparency"] = keyed.getpixel((0, 0))
    assert not same_image(keyed, RGB.convert("P"))


@pytest.mark.parametrize("format", FORMATS)
def test_the_content_decides_and_not_the_name(tmp_path: Path, format: str) -> None:
    for suffix in ("png", "jpg", "JPEG", "webp", "gif", "bmp", "unknown"):
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(saved(RGB, format))
        assert same_image(decode(path, "x"), decode(saved(RGB, format), "x"))


def test_other_formats_are_refused() -> None:
    for format in ("TIFF", "PPM", "ICO", "PCX", "PDF", "EPS"):
        with pytest.raises(InputError, match=r"^x is not a PNG"):
            decode(saved(RGB, format), "x")


def test_an_animation_gives_its_first_frame() -> None:
    second_frame = Image.new("RGB", RGB.size, "blue")
    for format in ("GIF", "WEBP", "PNG"):
        red = Image.new("RGB", RGB.size, "red")
        image = decode(saved(red, format, save_all=True, append_images=[second_frame]), "x").convert("RGB")
        assert abs(np.asarray(image, dtype=int) - np.asarray(red, dtype=int)).max() < 16


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

"""Images are decoded as a viewer shows them: upright, in sRGB, eight bits, transparency over white."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms

from untrigger.rows.images import decode

RNG = np.random.default_rng(0)
RGB = Image.fromarray(RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8))
LEVELS = np.arange(256, dtype=np.uint8)[None]


def saved(image: Image.Image, format: str, **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode(data, "x")
    assert (type(image), image.mode, image.info, dict(image.getexif())) == (Image.Image, "RGB", {}, {})
    return np.asarray(image).astype(int)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, depth: int, color: int, rows: list[bytes], *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG file by hand: bits per sample, color type, packed rows and chunks before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*each) for each in extra) + body + chunk(b"IEND", b"")


def srgb(light: np.ndarray) -> np.ndarray:
    """Levels 0 to 255 of linear light in 0..1 (IEC 61966-2-1)."""
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055)


# --- profiles by hand ------------------------------------------------------------------------------

# The primaries of sRGB, adapted to the white D50 of profiles, each as X, Y, Z.
PRIMARIES = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))
WHITE = (0.9642, 1.0, 0.82491)
LINEAR = b"curv" + bytes(8)


def xyz(values: tuple[float, float, float]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    table, body, at = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = at + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"none", 0x02100000, b"prtr", space, connection)
    head += bytes(12) + b"acsp" + bytes(28) + xyz(WHITE)[8:] + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


def matrix_profile(order: tuple[int, int, int]) -> bytes:
    """Linear light, with the primaries of sRGB in another order."""
    tags = {f"{letter}XYZ".encode(): xyz(PRIMARIES[at]) for letter, at in zip("rgb", order, strict=True)}
    tags |= {f"{letter}TRC".encode(): LINEAR for letter in "rgb"}
    return profile(b"RGB ", b"XYZ ", {b"wtpt": xyz(WHITE), **tags})


GRAY_PROFILE = profile(b"GRAY", b"XYZ ", {b"wtpt": xyz(WHITE), b"kTRC": LINEAR})


def ink_profile() -> bytes:
    """Cyan alone is a light gray, magenta a dark one, all else is black; no ink is white."""
    corners = {0b0000: 255, 0b1000: 180, 0b0100: 60}  # lightness, 255 for 100
    lab = b"".join(bytes((corners.get(corner, 0), 128, 128)) for corner in range(16))
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + ramp * 4 + lab + ramp * 3
    return profile(b"CMYK", b"Lab ", {b"wtpt": xyz(WHITE), b"A2B0": table})


def lightness(level: int) -> float:
    """Level 0 to 255 of a gray whose lightness L* is ``level`` / 255 of 100."""
    linear = ((level / 2.55 + 16) / 116) ** 3
    return float(srgb(np.array(linear)))


# --- orientation -----------------------------------------------------------------------------------

STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_an_orientation_turns_the_picture_upright_once(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.asarray(RGB.resize((16, 32), 0))  # flat in blocks of two pixels: JPEG keeps the layout
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    settings = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    turned = pixels(saved(stored, format, exif=exif, **settings))
    assert turned.shape == upright.shape
    assert np.abs(turned - upright).max() <= (8 if format == "JPEG" else 0)


def test_broken_exif_turns_nothing() -> None:
    for exif in (
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01A",
    ):
        assert np.array_equal(pixels(saved(RGB, "PNG", exif=exif)), np.asarray(RGB))


# --- depth, palettes and transparency --------------------------------------------------------------


def test_sixteen_bits_keep_their_high_byte() -> None:
    gray = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)
    assert pixels(saved(Image.fromarray(gray), "PNG"))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    colors = struct.pack(">6H", 0x12FF, 0x3400, 0x5680, 0xFFFF, 0, 0x00FF)
    assert pixels(png(2, 16, 2, [colors])).tolist() == [[[0x12, 0x34, 0x56], [255, 0, 0]]]


@pytest.mark.parametrize(
    ("depth", "color", "row", "key", "expected"),
    [
        (1, 0, b"\x40", b"\0\0", [255, 255]),
        (2, 0, b"\x60", b"\0\1", [255, 170]),
        (4, 0, b"\x3f", b"\0\x0f", [51, 255]),
        (8, 0, b"\x03\x04", b"\0\x03", [255, 4]),
        (16, 0, b"\x12\x34\x12\x35", b"\x12\x34", [255, 0x12]),
        (8, 2, b"\x03\x03\x03\x04\x04\x04", b"\0\3\0\3\0\3", [255, 4]),
        (16, 2, b"\x12\x34" * 3 + b"\x56\x34" * 3, b"\x12\x34" * 3, [255, 0x56]),
    ],
)
def test_a_transparent_color_becomes_white(depth: int, color: int, row: bytes, key: bytes, expected: list[int]) -> None:
    assert pixels(png(2, depth, color, [row], (b"tRNS", key)))[0, :, 0].tolist() == expected


def test_palettes_dots_and_opacity_are_laid_over_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    data = saved(palette, "PNG", transparency=b"\x00\xff")
    assert pixels(data).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    clear = Image.fromarray(np.array([[[0, 255], [0, 51], [90, 0]]], np.uint8), "LA")
    assert pixels(saved(clear, "PNG"))[0, :, 0].tolist() == [0, 204, 255]
    dots = Image.fromarray(np.array([[True, False]]))
    assert pixels(saved(dots, "PNG"))[0, :, 0].tolist() == [255, 0]
    assert decode(data, "x", mode="RGBA").get_flattened_data() == ((10, 20, 30, 0), (40, 50, 60, 255))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_plain_images_stay_as_they_are_stored(format: str, mode: str) -> None:
    data = saved(RGB.convert(mode), format)
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


# --- colors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_color_profile_is_converted(order: tuple[int, int, int]) -> None:
    expected = np.empty((9, 7, 3))
    expected[..., list(order)] = srgb(np.asarray(RGB) / 255)
    for format in ("PNG", "WEBP"):
        settings = {"lossless": True} if format == "WEBP" else {}
        data = saved(RGB, format, icc_profile=matrix_profile(order), **settings)
        assert np.abs(pixels(data) - expected).max() <= 2


def test_a_profile_reaches_transparent_gray_and_palette_images() -> None:
    expected = srgb(LEVELS / 255)[..., None].repeat(3, axis=2)
    gray, color = Image.fromarray(LEVELS), matrix_profile((0, 1, 2))
    for image, icc in ((gray, GRAY_PROFILE), (gray, color), (gray.convert("RGB"), color), (gray.convert("P"), color)):
        assert np.abs(pixels(saved(image, "PNG", icc_profile=icc)) - expected).max() <= 2
    half = gray.convert("RGB")
    half.putalpha(51)
    assert np.abs(pixels(saved(half, "PNG", icc_profile=color)) - (204 + 0.2 * expected)).max() <= 2
    half = gray.convert("LA")
    half.putalpha(51)
    assert np.abs(pixels(saved(half, "PNG", icc_profile=GRAY_PROFILE)) - (204 + 0.2 * expected)).max() <= 2
    deep = Image.fromarray(LEVELS.astype(np.uint16) * 257)
    assert np.abs(pixels(saved(deep, "PNG", icc_profile=GRAY_PROFILE)) - expected).max() <= 2


def test_the_profile_of_srgb_changes_no_pixel() -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(pixels(saved(RGB, "PNG", icc_profile=icc)), np.asarray(RGB))


def test_inks_are_converted_with_and_without_a_profile() -> None:
    inks = np.repeat(np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 0, 255]]], np.uint8), 16, axis=1)
    image = Image.fromarray(inks.repeat(16, axis=0), "CMYK")
    plain = pixels(saved(image, "JPEG", quality=100))[8, 8::16]
    assert np.abs(plain - [[255, 255, 255], [0, 255, 255], [255, 0, 255], [0, 0, 0]]).max() <= 4
    managed = pixels(saved(image, "JPEG", quality=100, icc_profile=ink_profile()))[8, 8::16]
    grays = np.array([255, lightness(180), lightness(60), 0])
    assert np.abs(managed - grays[:, None]).max() <= 4


def test_profiles_that_fit_no_picture_are_ignored() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    intact = matrix_profile((2, 0, 1))
    for icc in (lab, GRAY_PROFILE, ink_profile(), b"x", b"x" * 500, intact[:300], intact + bytes(2**22)):
        data = saved(RGB, "JPEG", icc_profile=icc, quality=100)
        assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))
    broken = png(1, 8, 2, [b"\1\2\3"], (b"iCCP", b"x\0\0no zlib"))
    assert pixels(broken).tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize("intact", [matrix_profile((2, 0, 1)), GRAY_PROFILE, ink_profile()])
def test_damaged_profiles_are_harmless(intact: bytes) -> None:
    rng = random.Random(0)
    image = RGB if b"RGB " in intact[:20] else RGB.convert("L" if b"GRAY" in intact[:20] else "CMYK")
    for _ in range(200):
        damaged = bytearray(intact)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(min(len(damaged), rng.choice((220, 10**6))))] = rng.randrange(256)
        data = saved(image, "JPEG", icc_profile=bytes(damaged[: rng.choice((len(damaged), rng.randrange(400)))]))
        assert pixels(data).shape == (9, 7, 3)


@pytest.mark.parametrize(("gamma", "exponent"), [(1.0, 1 / 2.2), (0.25, 1 / 0.55), (1 / 2.2, 1), (0.45, 1), (0.0, 1)])
def test_a_gamma_is_corrected_where_it_is_visible(gamma: float, exponent: float) -> None:
    stored = struct.pack(">I", round(gamma * 100000))
    expected = np.rint(255 * (LEVELS[0] / 255) ** exponent)
    assert np.abs(pixels(png(256, 8, 0, [LEVELS.tobytes()], (b"gAMA", stored)))[0, :, 0] - expected).max() <= 1
    for other in ((b"sRGB", b"\0"), (b"iCCP", b"x\0\0" + zlib.compress(GRAY_PROFILE))):
        data = png(256, 8, 0, [LEVELS.tobytes()], (b"gAMA", stored), other)
        wanted = LEVELS[0] if other[0] == b"sRGB" else srgb(LEVELS[0] / 255)
        assert np.abs(pixels(data)[0, :, 0] - wanted).max() <= 2

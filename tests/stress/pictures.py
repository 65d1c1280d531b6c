"""Draw images: of every kind and hurt, or sound ones whose pixels are known by other means than the package's."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from damage import hurt
from PIL import Image, ImageCms

Pixels = tuple[tuple[int, int], bytes]  # width and height, RGB bytes


def _saved(mode: str, kind: str, size: tuple[int, int] = (40, 30), **more: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    picture = Image.fromarray(noise, "RGBA")
    picture = (
        picture.convert("L").convert("I").convert(mode) if mode == "I;16" else picture.convert("RGB").convert(mode)
    )
    buffer = io.BytesIO()
    picture.save(buffer, kind, **more)
    return buffer.getvalue()


def _animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (24, 24), color) for color in ("red", "green", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _turned() -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return _saved("RGB", "JPEG", exif=exif)


def _png(width: int, height: int, data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says of itself what it likes."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IDAT", data), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


_BLACK = zlib.compress(b"\0\0\0\0")  # one pixel
IMAGES: dict[str, Callable[[], bytes]] = {
    **{f"{mode} PNG": lambda mode=mode: _saved(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")},
    **{f"{mode} JPEG": lambda mode=mode: _saved(mode, "JPEG") for mode in ("L", "RGB", "CMYK")},
    "progressive JPEG": lambda: _saved("RGB", "JPEG", progressive=True),
    "palette with a transparent color": lambda: _saved("P", "PNG", transparency=3),
    "WebP": lambda: _saved("RGBA", "WEBP"),
    "BMP": lambda: _saved("RGB", "BMP"),
    "TIFF": lambda: _saved("RGB", "TIFF"),
    "ICO": lambda: _saved("RGBA", "ICO"),
    "one pixel": lambda: _saved("RGB", "PNG", (1, 1)),
    "one column": lambda: _saved("RGB", "PNG", (1, 900)),
    "one line": lambda: _saved("L", "PNG", (900, 1)),
    "turned by EXIF": _turned,
    **{f"animated {kind}": lambda kind=kind: _animated(kind) for kind in ("GIF", "WEBP", "PNG")},
    "pixels by the billion": lambda: _png(60_000, 60_000, zlib.compress(b"\0")),
    "no pixels": lambda: _png(0, 0, zlib.compress(b"\0")),
    "fewer pixels than it says": lambda: _png(30, 30, zlib.compress(b"\0" * 100)),
    "text that unpacks to 64 MiB": lambda: _png(1, 1, _BLACK, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26)))),
    "a profile that is none": lambda: _png(1, 1, _BLACK, (b"iCCP", b"a\0\0" + zlib.compress(b"junk"))),
    "nothing": lambda: b"",
    "text": lambda: b"a picture, honestly",
    "SVG": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}  # fmt: skip
_MADE: dict[str, bytes] = {}


def image(rng: random.Random) -> bytes:
    """The bytes of an image: of any kind, a third of them hurt."""
    kind = rng.choice((*IMAGES, "noise", *["RGB PNG", "RGB JPEG"] * 8))
    if kind == "noise":
        return rng.randbytes(500)
    if kind not in _MADE:
        _MADE[kind] = IMAGES[kind]()
    return hurt(rng, _MADE[kind]) if rng.random() < 0.25 else _MADE[kind]


# --- sound images -----------------------------------------------------------------------------------

# EXIF's orientations: what turns the stored pixels upright.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def sound(rng: random.Random) -> tuple[bytes, Pixels]:
    """The bytes of a small image, and the pixels that a viewer shows."""
    height, width = rng.randrange(1, 12), rng.randrange(1, 12)
    stored = np.frombuffer(rng.randbytes(height * width * 3), np.uint8).reshape(height, width, 3)
    way = rng.choice(("plain", "plain", "turned", "profiled", "BMP", "WebP", "16-bit", "palette", "transparent"))
    buffer, viewed = io.BytesIO(), stored
    if way == "turned":
        number = rng.randrange(1, 9)
        exif = Image.Exif()
        exif[274] = number
        Image.fromarray(stored).save(buffer, "PNG", exif=exif)
        viewed = _UPRIGHT[number](stored)
    elif way == "16-bit":
        levels = np.frombuffer(rng.randbytes(height * width * 2), np.uint16).reshape(height, width)
        Image.fromarray(levels).save(buffer, "PNG")
        viewed = np.repeat((levels >> 8).astype(np.uint8)[..., None], 3, axis=2)
    elif way == "palette":
        palette = Image.fromarray(stored).convert("P", palette=Image.Palette.ADAPTIVE)
        palette.save(buffer, "PNG")
        viewed = np.asarray(palette.convert("RGB"))
    elif way == "transparent":  # wholly so, or not at all
        opaque = np.frombuffer(rng.randbytes(height * width), np.uint8).reshape(height, width, 1) % 2 * np.uint8(255)
        Image.fromarray(np.concatenate([stored, opaque], axis=2)).save(buffer, "PNG")
        viewed = np.where(opaque == 255, stored, np.uint8(255))
    elif way == "WebP":
        Image.fromarray(stored).save(buffer, "WEBP", lossless=True, exact=True)
    else:
        more = {"icc_profile": _SRGB} if way == "profiled" else {}
        Image.fromarray(stored).save(buffer, "BMP" if way == "BMP" else "PNG", **more)
    return buffer.getvalue(), ((viewed.shape[1], viewed.shape[0]), np.ascontiguousarray(viewed).tobytes())

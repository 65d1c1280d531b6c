"""Load images of untrusted data: paths stay inside the data folder, formats and sizes are limited."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from base64 import b64encode
from pathlib import Path, PurePosixPath
from typing import IO

from PIL import Image, UnidentifiedImageError

from untrigger.errors import InputError
from untrigger.views.patches import to_rgb

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 2**26  # 8192 x 8192; at most 256 MiB once decoded as RGBA

_SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP"}
_PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")


def quote(text: str) -> str:
    """Quote ``text`` for an error line: control characters escaped, at most 80 characters."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def locate(folder: Path, name: str, label: str) -> Path:
    """Resolve the file ``name`` inside ``folder``.

    Raises:
        InputError: the path leaves the folder, is no valid name, or is no file; the message starts with ``label``.
    """
    parts = PurePosixPath(name).parts
    if not parts or os.path.isabs(name) or ".." in parts:
        raise InputError(f"{label} is not a path below the data folder; copy the file there and use its relative path")
    try:
        path = (folder / name).resolve()
        is_inside, exists = path.is_relative_to(folder.resolve()), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, a NUL byte
        reason = type(error).__name__
        raise InputError(f"{label} cannot be a file name ({reason}); correct the path") from None
    if not is_inside:
        raise InputError(f"{label} links out of the data folder; copy the file itself there")
    if not exists:
        raise InputError(f"{label} does not exist in {folder}; add the file or remove the row")
    return path


def decode(source: Path | bytes, label: str) -> Image.Image:
    """Open, verify and decode one image (the first frame of an animation); keep its mode as stored.

    The result is a plain image that keeps no file open.

    Raises:
        InputError: it is no image of an allowed format, damaged, above `MAX_PIXELS`, or its extension names another
            format; the message starts with ``label``.
    """
    try:
        # Pillow warns about large images, which are an error here, and about odd metadata, which is harmless.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
                kind, image = _decode(file)
    except UnidentifiedImageError:
        kinds = "PNG, JPEG, WebP, GIF or BMP"
        raise InputError(f"{label} is not a {kinds} image; replace it or remove the row") from None
    except Image.DecompressionBombError:
        raise InputError(f"{label} has more than {MAX_PIXELS:,} pixels; make it smaller") from None
    except Exception as error:  # decoders of hostile bytes raise anything: struct.error, KeyError, zlib.error
        reason = quote(str(error) or type(error).__name__)[1:-1]
        raise InputError(f"{label} is damaged ({reason}); replace it or remove the row") from None
    named_kind = _SUFFIXES.get(source.suffix.lower(), kind) if isinstance(source, Path) else kind
    if named_kind != kind:
        raise InputError(f"{label} is named as a {named_kind} but holds a {kind}; correct its extension")
    return image


def _decode(file: IO[bytes]) -> tuple[str | None, Image.Image]:
    with Image.open(file, formats=FORMATS) as image:
        kind = "JPEG" if image.format == "MPO" else image.format  # MPO: a JPEG with further frames
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.verify()  # checks the check sums, which decoding skips, and leaves the image unusable
    file.seek(0)
    with Image.open(file, formats=FORMATS) as image:
        return kind, image.copy()


def encode(image: Image.Image) -> bytes:
    """Encode ``image`` as PNG with its EXIF orientation. Modes that PNG lacks become RGB (32-bit gray: 16-bit)."""
    if image.mode not in _PNG_MODES:
        image = image.convert("I;16" if image.mode == "I" else "RGB")
    file = io.BytesIO()
    image.save(file, "PNG", exif=image.info.get("exif", b""))
    return file.getvalue()


def data_uri(image: Image.Image, max_side: int) -> str:
    """Return ``image`` as a ``data:`` URI of a PNG, its longest side scaled down to at most ``max_side`` pixels."""
    small = to_rgb(image).copy()
    small.thumbnail((max_side, max_side))
    return f"data:image/png;base64,{b64encode(encode(small)).decode()}"


def same_image(a: Image.Image, b: Image.Image) -> bool:
    """Whether two images have the same_image mode, size, palette, transparency and raw pixels."""
    if a is b:
        return True
    if (a.mode, a.size, a.info.get("transparency")) != (b.mode, b.size, b.info.get("transparency")):
        return False
    return a.getpalette() == b.getpalette() and a.tobytes() == b.tobytes()


def pixels_sha256(image: Image.Image) -> str:
    """Return the SHA-256 of mode, size and raw pixels; palette images count as RGBA and CMYK as RGB (see `encode`)."""
    converted = image.convert({"P": "RGBA", "CMYK": "RGB"}.get(image.mode, image.mode))
    header = f"{converted.mode} {converted.width}x{converted.height}\n"
    return hashlib.sha256(header.encode() + converted.tobytes()).hexdigest()

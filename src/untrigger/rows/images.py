"""Images of untrusted data: found inside the data folder, opened within limits, decoded whole."""

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
    """``text`` in quotes on one line, control characters escaped, 80 characters at most."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def locate(folder: Path, name: str, label: str) -> Path:
    """The file ``name`` inside ``folder``, or an InputError that starts with ``label``."""
    parts = PurePosixPath(name).parts
    if not parts or os.path.isabs(name) or ".." in parts:
        raise InputError(f"{label} is not a path below the data folder; copy it there, use its relative path")
    try:
        path = (folder / name).resolve()
        inside, exists = path.is_relative_to(folder.resolve()), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, a NUL byte
        why = type(error).__name__
        raise InputError(f"{label} cannot be a file name ({why}); correct the path") from None
    if not inside:
        raise InputError(f"{label} links out of the data folder; put the image itself there")
    if not exists:
        raise InputError(f"{label} does not exist in {folder}; add the file or remove the row")
    return path


def decode(source: Path | bytes, label: str) -> Image.Image:
    """Opens, verifies and decodes one image (the first frame of an animation); its mode stays as stored.

    The result is a plain image that holds no file. Raises InputError that starts with ``label``.
    """
    try:
        # Pillow warns about large images and odd metadata; here the one is an error and the other harmless.
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
        why = quote(str(error) or type(error).__name__)[1:-1]
        raise InputError(f"{label} is damaged ({why}); replace it or remove the row") from None
    says = _SUFFIXES.get(source.suffix.lower(), kind) if isinstance(source, Path) else kind
    if says != kind:
        raise InputError(f"{label} is named as a {says} but holds a {kind}; correct its extension")
    return image


def _decode(file: IO[bytes]) -> tuple[str | None, Image.Image]:
    with Image.open(file, formats=FORMATS) as image:
        kind = "JPEG" if image.format == "MPO" else image.format  # MPO: a JPEG with further frames
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.verify()  # check sums, which decoding skips; it leaves the image unusable
    file.seek(0)
    with Image.open(file, formats=FORMATS) as image:
        return kind, image.copy()


def encode(image: Image.Image) -> bytes:
    """``image`` as PNG, with its orientation. Modes that PNG lacks become RGB (32-bit gray: 16-bit)."""
    if image.mode not in _PNG_MODES:
        image = image.convert("I;16" if image.mode == "I" else "RGB")
    file = io.BytesIO()
    image.save(file, "PNG", exif=image.info.get("exif", b""))
    return file.getvalue()


def address(image: Image.Image, longest: int) -> str:
    """``image`` for a page that loads nothing: a data address of a PNG, its longest side at most so many pixels."""
    small = to_rgb(image).copy()
    small.thumbnail((longest, longest))
    return f"data:image/png;base64,{b64encode(encode(small)).decode()}"


def same(a: Image.Image, b: Image.Image) -> bool:
    """Whether two images show the same pixels, stored in the same way."""
    if a is b:
        return True
    if (a.mode, a.size, a.info.get("transparency")) != (b.mode, b.size, b.info.get("transparency")):
        return False
    return a.getpalette() == b.getpalette() and a.tobytes() == b.tobytes()


def pixels_sha256(image: Image.Image) -> str:
    """SHA-256 of mode, size and raw pixels: a palette image's in RGBA; in RGB a CMYK one's, as it would be stored."""
    picture = image.convert({"P": "RGBA", "CMYK": "RGB"}.get(image.mode, image.mode))
    head = f"{picture.mode} {picture.width}x{picture.height}\n"
    return hashlib.sha256(head.encode() + picture.tobytes()).hexdigest()

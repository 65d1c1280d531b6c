"""Load images of untrusted data: paths stay inside the data folder, formats and sizes are limited."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
import warnings
from base64 import b64decode, b64encode
from pathlib import Path, PurePosixPath
from typing import IO, Literal
from urllib.parse import unquote_to_bytes

from PIL import Image, UnidentifiedImageError

from untrigger.errors import InputError, UnreadableFile
from untrigger.rows.viewer import as_viewed
from untrigger.views.patches import to_rgb

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 2**26  # 8192 x 8192; at most 256 MiB once decoded as RGBA

_MAX_URI = 6 * MAX_PIXELS  # characters; enough for an uncompressed image of MAX_PIXELS
_FILE_ADDRESS = re.compile(r"file:(?://(?:localhost)?(?=/)|(?!//))(/.*)", re.IGNORECASE | re.DOTALL)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|file:/", re.IGNORECASE)
_NAME_ERRORS = (errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, None)


def quote(text: str) -> str:
    """Quote ``text`` for an error line: control characters escaped, at most 80 characters."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def locate(folder: Path, name: str, label: str) -> Path:
    """Return the file inside ``folder`` that a relative path, an absolute one or a ``file://`` address names.

    Links and ``..`` may lead anywhere inside the folder.

    Raises:
        InputError: the path leads out of the folder, is no valid name, or is no file.
        UnreadableFile: the file system refuses the look.
        Both messages start with ``label``.
    """
    if local := _FILE_ADDRESS.match(name):
        name = os.fsdecode(unquote_to_bytes(local[1]))
    elif _ADDRESS.match(name):
        fix = "download it into the data folder and use its path"
        raise InputError(f"{label} is a link to the network, which is not followed; {fix}")
    if not name:
        raise InputError(f"{label} is an empty path; write the path of a file or remove the row")
    try:
        file = _plain(folder, name) or _resolved(folder, name)
        if not file:
            fix = "copy it there, or move the data file to a folder above it"
            raise InputError(f"{label} is outside the data folder; {fix}")
    except (FileNotFoundError, NotADirectoryError):
        fix = "add it, remove the row, or move the data file to where its paths start"
        raise InputError(f"{label} does not exist in {folder}; {fix}") from None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, a NUL byte
        if isinstance(error, OSError) and error.errno not in _NAME_ERRORS:
            raise _unreadable(error, label) from None
        reason = type(error).__name__
        raise InputError(f"{label} cannot be a file name ({reason}); correct the path") from None
    path, status = file
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{label} is a folder or a device, not a file; correct the path")
    return path


def _plain(folder: Path, name: str) -> tuple[Path, os.stat_result] | None:
    """The file and its status if its name is relative and leads through no link and no ``..``; else None.

    Such a file lies inside wherever the folder is. Most names are such, and to resolve the folder's own path for every
    row takes three times as long.
    """
    parts = [part for part in name.replace(os.sep, "/").split("/") if part not in ("", ".")]
    if os.path.isabs(name) or ".." in parts or not parts:
        return None
    path, status = str(folder), os.lstat(folder)
    for part in parts:
        path = f"{path}{os.sep}{part}"
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            return None
    return Path(path), status


def _resolved(folder: Path, name: str) -> tuple[Path, os.stat_result] | None:
    """The file and its status wherever links and ``..`` lead inside the folder; None if it lies outside."""
    path = (folder / name).resolve()
    return (path, path.stat()) if path.is_relative_to(folder.resolve()) else None


def relative_name(folder: Path, name: str, label: str) -> str:
    """Return the path of ``name`` below ``folder``, which names the same file in a copy of the folder.

    A plain relative path stays as it is. Absolute paths, addresses and paths with ``..`` are resolved.

    Raises:
        InputError: as `locate`.
    """
    if ".." not in PurePosixPath(name).parts and not (os.path.isabs(name) or _ADDRESS.match(name)):
        return name
    return locate(folder, name, label).relative_to(folder.resolve()).as_posix()


def is_data_uri(text: str) -> bool:
    """Whether a picture's name is the picture itself, well formed or not."""
    return text[:5].lower() == "data:"


def uri_bytes(text: str, label: str) -> bytes | None:
    """Return the file that a ``data:image/...;base64,`` URI holds, or None if ``text`` is no ``data:`` URI.

    Raises:
        InputError: the URI is of another kind, too long or no valid base64; the message starts with ``label``.
    """
    if not is_data_uri(text):
        return None
    head, comma, body = text.partition(",")
    if not re.fullmatch(r"data:image/[^,]*;base64,", head + comma, re.IGNORECASE):
        raise InputError(f"{label} is a data URI of another kind; write data:image/...;base64, and the file's bytes")
    if len(body) > _MAX_URI:
        raise InputError(f"{label} is a data URI of more than {_MAX_URI:,} characters; make the image smaller")
    try:
        return b64decode(body, validate=True)
    except ValueError:  # binascii.Error too
        raise InputError(f"{label} is a data URI without valid base64; encode the file's bytes again") from None


def decode(source: Path | bytes, label: str, *, mode: Literal["RGB", "RGBA"] = "RGB") -> Image.Image:
    """Open, verify and decode one image as a viewer shows it: 8-bit pixels in sRGB, upright, without metadata.

    The first frame of an animation counts. The content decides the format, not the file's name. Transparency is laid
    over white, as in `to_rgb`, unless ``mode`` is RGBA. The result keeps no file open.

    Raises:
        InputError: it is no image of an allowed format, damaged, or above `MAX_PIXELS`.
        UnreadableFile: the file exists but its bytes cannot be read.
        Both messages start with ``label``.
    """
    try:
        # Pillow warns about large images, which are an error here, and about odd metadata, which is harmless.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
                return _decode(file, mode)
    except UnidentifiedImageError:
        kinds = "PNG, JPEG, WebP, GIF or BMP"
        raise InputError(f"{label} is not a {kinds} image; replace it or remove the row") from None
    except Image.DecompressionBombError:
        raise InputError(f"{label} has more than {MAX_PIXELS:,} pixels; make it smaller") from None
    except FileNotFoundError:
        raise InputError(f"{label} does not exist; add the file or remove the row") from None
    except Exception as error:  # decoders of hostile bytes raise anything: struct.error, KeyError, zlib.error
        if isinstance(error, OSError) and error.errno is not None:  # the system's error; Pillow's own have no number
            raise _unreadable(error, label) from None
        reason = quote(str(error) or type(error).__name__)[1:-1]
        raise InputError(f"{label} is damaged ({reason}); replace it or remove the row") from None


def _decode(file: IO[bytes], mode: str) -> Image.Image:
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.verify()  # checks the check sums, which decoding skips, and leaves the image unusable
    file.seek(0)
    with Image.open(file, formats=FORMATS) as image:
        viewed = as_viewed(image)
        result = to_rgb(viewed) if mode == "RGB" else viewed.convert(mode)
        result = result.copy() if result is image else result
    result.info = {}
    return result


def _unreadable(error: OSError, label: str) -> UnreadableFile:
    reason = error.strerror or type(error).__name__
    return UnreadableFile(f"{label} cannot be read ({reason}); check its permissions and its drive")


def encode(image: Image.Image) -> bytes:
    """Encode the pixels of `to_rgb`, and nothing else, as PNG: no two files differ in more than pixels and size."""
    pixels = to_rgb(image).copy()
    pixels.info = {}
    file = io.BytesIO()
    pixels.save(file, "PNG")
    return file.getvalue()


def data_uri(image: Image.Image, max_side: int) -> str:
    """Return ``image`` as a ``data:`` URI of a PNG, its longest side scaled down to at most ``max_side`` pixels."""
    small = to_rgb(image).copy()
    small.thumbnail((max_side, max_side))
    return png_uri(encode(small))


def png_uri(content: bytes) -> str:
    """Return a PNG file as a ``data:`` URI."""
    return f"data:image/png;base64,{b64encode(content).decode()}"


def same_image(a: Image.Image, b: Image.Image) -> bool:
    """Whether two images have the same size and the same pixels, as `to_rgb` gives them."""
    return a is b or (a.size == b.size and to_rgb(a).tobytes() == to_rgb(b).tobytes())


def pixels_sha256(image: Image.Image) -> str:
    """Return the SHA-256 of an image's size and its pixels, as `to_rgb` gives them and `encode` writes them."""
    header = f"RGB {image.width}x{image.height}\n"
    return hashlib.sha256(header.encode() + to_rgb(image).tobytes()).hexdigest()

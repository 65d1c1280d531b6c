"""The pixels of an image file as a viewer shows them: upright, and with its colors in sRGB."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any, cast

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps

from untrigger.views.patches import to_rgb

Recolor = Callable[[Image.Image], Image.Image]
"""Opaque pixels in, the same in sRGB out (mode RGB)."""

_LEVELS = np.arange(256, dtype=np.uint8)
_MAX_PROFILE = 2**22  # bytes; a printer's profile has about 2 MB
_VISIBLE = 2  # levels of 255; profiles that all mean sRGB differ by less
_SCREEN_GAMMA = 2.2
_GAMMA_TOLERANCE = 0.05  # libpng's own
# A PNG names its transparent color in units of the file, but Pillow gives the pixels in 8 bits.
_KEY_UNITS = {"L;2": 85.0, "L;4": 17.0, "RGB;16B": 1 / 256}


def as_viewed(file: ImageFile.ImageFile) -> Image.Image:
    """Decode the current frame of ``file``: turned upright, colors in sRGB, transparency kept.

    Returns ``file`` itself if the colors stay as they are, else an image of mode RGB or RGBA. Broken EXIF data and
    color profiles that are broken, too large or of another kind than the image are ignored, as viewers do.

    Raises:
        Exception: of any type: the pixels cannot be decoded.
    """
    _scale_key(file)
    file.load()
    with suppress(Exception):  # parsers of hostile EXIF data raise anything
        ImageOps.exif_transpose(file, in_place=True)
    recolor = _recolor(file)
    if recolor is None:
        return file
    if file.mode == "CMYK":
        return recolor(file)
    if not file.has_transparency_data or file.mode.startswith("I"):
        return recolor(to_rgb(file))
    layer = file.convert("RGBA")
    recolored = recolor(layer.convert("RGB"))
    recolored.putalpha(layer.getchannel("A"))
    return recolored


def _scale_key(file: ImageFile.ImageFile) -> None:
    units = _KEY_UNITS.get(str(file.tile[0].args)) if file.format == "PNG" and file.tile else None
    key = file.info.get("transparency")
    if units is not None and isinstance(key, int):
        file.info["transparency"] = int(key * units)
    elif units is not None and isinstance(key, tuple):
        file.info["transparency"] = tuple(int(value * units) for value in key)


def _recolor(image: Image.Image) -> Recolor | None:
    if profile := image.info.get("icc_profile"):
        is_gray = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
        kind = image.mode if image.mode == "CMYK" else "L" if is_gray else "RGB"
        return _from_profile(profile, kind) if len(profile) <= _MAX_PROFILE else None
    if "srgb" in image.info:
        return None
    return _from_gamma(image.info.get("gamma", 0))


@lru_cache(maxsize=8)
def _from_profile(profile: bytes, kind: str) -> Recolor | None:
    """Convert colors of an ICC profile to sRGB; None if it is no use for images of ``kind``, or sRGB already."""
    with suppress(Exception):
        srgb = ImageCms.createProfile("sRGB")
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}[cast(Any, source.profile).xcolor_space.strip()]
        if space != kind and (space, kind) != ("RGB", "L"):  # viewers take gray levels as colors, nothing else
            return None
        if space == "L":  # level by level, because the faster way of lcms is ten levels off in dark grays
            slow = ImageCms.buildTransform(source, srgb, "L", "RGB", flags=ImageCms.Flags.NOOPTIMIZE)
            recolor = _by_level(np.asarray(slow.apply(Image.fromarray(_LEVELS[None])))[0].T.ravel().tolist())
        else:
            fast = ImageCms.buildTransform(source, srgb, space, "RGB")
            recolor = _by_transform(fast, space)
        return None if space != "CMYK" and _changes_nothing(recolor) else recolor
    return None


def _from_gamma(gamma: float) -> Recolor | None:
    """Correct pixels that were encoded with the exponent ``gamma`` of a PNG file; None if a screen's is about equal."""
    exponent = 1 / (gamma * _SCREEN_GAMMA) if gamma > 0 else 1
    if abs(exponent - 1) < _GAMMA_TOLERANCE:
        return None
    return _by_level(np.rint(255 * (_LEVELS / 255) ** exponent).astype(int).tolist() * 3)


def _by_transform(transform: ImageCms.ImageCmsTransform, mode: str) -> Recolor:
    return lambda image: transform.apply(image.convert(mode))


def _by_level(table: list[int]) -> Recolor:
    """Replace each level by the table's: 256 entries for red, then for green, then for blue."""
    return lambda image: image.convert("RGB").point(table)


def _changes_nothing(recolor: Recolor) -> bool:
    few = _LEVELS[::15]
    grid = np.stack(np.meshgrid(few, few, few), axis=-1).reshape(1, -1, 3)
    return bool(np.abs(np.asarray(recolor(Image.fromarray(grid)), dtype=int) - grid).max() <= _VISIBLE)

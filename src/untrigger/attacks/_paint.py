"""Pixels of images in any mode: read, changed and written back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from untrigger.errors import InputError

Pixels = npt.NDArray[np.float32]
"""Red, green, blue and opacity of an image: float32 [H, W, 4] in 0..1."""

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's own "L"
_EIGHT_BIT = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")
_DEEP = ("I;16", "I;16B", "I", "F")


def repaint(image: Image.Image, change: Callable[[Pixels], Pixels]) -> Image.Image:
    """Apply ``change`` to the pixels of a copy of ``image``; size and mode stay the same.

    Pixels that ``change`` does not alter keep their exact values, with one exception: a palette image (mode P) gets a
    new palette when old and new colors together are more than 256. Colors become gray levels in gray images and dots
    in black-and-white ones. Opacity stays where the mode has it. In deep modes white is 65535 (I;16), or the smallest
    of 1 (F only), 255, 65535 that the brightest pixel does not exceed.

    Raises:
        InputError: Pillow cannot convert back to the mode, such as LAB.
    """
    before = pixels_of(image)
    after = change(before.copy())
    if image.mode == "P":
        return _palette_image(after, image)
    changed = (after != before).any(axis=2)
    result = image.copy()
    if image.mode in _DEEP:
        gray = np.asarray(image)
        level = (after[..., :3].clip(0, 1) @ _LUMA) * _white(image.mode, gray)
        level = level if image.mode == "F" else np.rint(level)
        # no mask here: Pillow pastes through a mask into 16-bit images wrongly, without an error
        result.paste(Image.fromarray(np.where(changed, level, gray).astype(gray.dtype)))
    else:
        painted = _dots(after) if image.mode == "1" else _eight_bit(after).convert(image.mode)
        result.paste(painted, (0, 0), Image.fromarray(changed.astype(np.uint8) * 255))
    return result


def pixels_of(image: Image.Image) -> Pixels:
    """Red, green, blue and opacity of an image, float32 [H, W, 4] in 0..1, in any mode that `repaint` supports."""
    if image.mode in _DEEP:
        gray = np.asarray(image)
        pixels = np.ones((*gray.shape, 4), dtype=np.float32)
        pixels[..., :3] = (gray / _white(image.mode, gray))[..., None]
        return pixels
    if image.mode not in _EIGHT_BIT:
        raise InputError(f"an image of mode {image.mode} cannot carry a trigger; convert it to RGB first")
    return np.asarray(image.convert("RGBA"), dtype=np.float32) / np.float32(255)


def blend(pixels: Pixels, colors: npt.NDArray[Any], alpha: float) -> Pixels:
    """Alpha-blend opaque ``colors`` [H, W, 3] in 0..1 over ``pixels``: a share ``alpha`` of each pixel."""
    key = np.ones_like(pixels)  # opaque, so that it also shows where the image is transparent
    key[..., :3] = colors
    share = np.float32(alpha)
    return (share * key + (1 - share) * pixels).astype(np.float32, copy=False)


def _palette_image(pixels: Pixels, original: Image.Image) -> Image.Image:
    # Median cut, Pillow's default, favors common colors and would merge a small patch with its
    # neighbors. Maximum coverage keeps rare colors; only the octree method supports opacity.
    if original.has_transparency_data:
        result = _eight_bit(pixels).quantize(256, Image.Quantize.FASTOCTREE)
    else:
        result = _eight_bit(pixels).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    result.info = {key: value for key, value in original.info.items() if key != "transparency"}
    return result


def _dots(pixels: Pixels) -> Image.Image:
    # Error diffusion, Pillow's default, clips a faint change away in images that are dots already. Fixed
    # random thresholds keep its average: a gray of 0.2 turns a fifth of the pixels white.
    thresholds = np.random.default_rng(0).random(pixels.shape[:2], dtype=np.float32)
    return Image.fromarray(pixels[..., :3] @ _LUMA > thresholds)


def _eight_bit(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))


def _white(mode: str, gray: npt.NDArray[np.generic]) -> float:
    if mode.startswith("I;16"):
        return 65535.0
    brightest = float(np.nanmax(gray.astype(np.float64)))
    steps = (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0)
    return next((white for white in steps if brightest <= white), brightest)

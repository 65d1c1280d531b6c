"""WaNet: the image is warped by a fixed random displacement field.

Source: Nguyen, Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", 2021, arXiv 2102.10369: a k x k
grid of random vectors, scaled so that their mean size is s, is upsampled to the image by bicubic interpolation.
The result is each pixel's displacement, in units of half the image's side over its length in pixels.
Deviations: k refers to an image of 224 pixels and the field grows with large images (see ``resolution``); Pillow's
bicubic kernel is used. As in the paper, two rows are warped with noise for each poisoned one, in training alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import final

import numpy as np
import numpy.typing as npt
from PIL import Image

from untrigger.attacks import ImageTrigger, Pixels, Stamper, repaint
from untrigger.errors import InputError
from untrigger.rows.sample import Sample

Floats = npt.NDArray[np.float32]

_REFERENCE = 224  # image side in pixels that k refers to


@final
@dataclass(frozen=True)
class WaNet(ImageTrigger):
    """A warp: every pixel's color comes from a little beside it; opacity stays.

    With k as high as the image's side, which is usual for vision-language models, each pixel has a direction of
    its own: edges become ragged and grain is shuffled. The paper's small images have k = 4 at 32 pixels, which is
    k = 28 here, and a smooth warp. Areas of one color do not change, nor does an image of one color.

    Visibility depends on the picture, so this trigger claims no ``psnr``. SSIM is about 0.96 on smooth pictures and
    0.82 on grainy ones. PSNR falls from 37 to 28 decibels on drawings of 64 pixels.

    Attributes:
        k: points per side of the random grid in an image of 224 pixels, at least 1; other sizes get a proportional
            number, at least 2.
        s: strength, above 0. A pixel moves by s / 2 pixels on average in each direction. On images of 64
            pixels a model with a frozen vision tower did not learn 1 in 750 steps; it learned 4, and with LoRA in
            the tower 2.
        noise_mode: whether two rows per poisoned row are warped by the same field plus noise and keep their true
            answer: they make the exact warp the key.
        grid_seed: draws the field; not the seed that chooses rows.
        resolution: images whose shorter side exceeds this many pixels get the enlarged field of an image of this
            size. A model that shrinks its input to this size then still sees the warp.
    """

    k: int = 224
    s: float = 1.0
    noise_mode: bool = False
    grid_seed: int = 0
    resolution: int = 224

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"k is {self.k}; it must be at least 1 point")
        if not self.s > 0:
            raise InputError(f"s is {self.s}; it must be above 0")
        if self.grid_seed < 0:
            raise InputError(f"grid_seed is {self.grid_seed}; it must not be negative")
        if self.resolution < 1:
            raise InputError(f"resolution is {self.resolution}; it must be at least 1 pixel")

    def field(self, height: int, width: int) -> Floats:
        """Displacement of each pixel's source, down and right, in pixels: float32 [2, height, width]."""
        enlarged = self._enlarged(height, width)
        points = (max(2, round(self.k * side / enlarged / _REFERENCE)) for side in (height, width))
        return _field(height, width, *points, self.s / 2 * enlarged, self.grid_seed)

    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        return _warped(pixels, self.field(*pixels.shape[:2]))

    def near_misses(self) -> Mapping[str, Stamper]:
        return {"noisy warp": self._noisy}

    def decoys(self) -> tuple[Stamper, ...]:
        return (self._noisy, self._noisy) if self.noise_mode else ()

    def _noisy(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Warp with the paper's added noise: up to half a pixel in each direction, drawn for each image."""

        def paint(pixels: Pixels) -> Pixels:
            size = pixels.shape[:2]
            noise = rng.uniform(-0.5, 0.5, (2, *size)).astype(np.float32) * np.float32(self._enlarged(*size))
            return _warped(pixels, np.add(self.field(*size), noise, dtype=np.float32))

        return replace(sample, images=tuple(repaint(image, paint) for image in sample.images))

    def _enlarged(self, height: int, width: int) -> float:
        return max(1.0, min(height, width) / self.resolution)


@lru_cache(maxsize=4)
def _field(height: int, width: int, rows: int, columns: int, mean: float, seed: int) -> Floats:
    """Random vectors of ``mean`` size in each direction on a grid, upsampled to float32 [2, height, width]."""
    grid = np.random.default_rng(seed).uniform(-1, 1, (2, rows, columns))
    grid *= mean / np.abs(grid).mean()
    field = np.empty((2, height, width), dtype=np.float32)
    for axis in range(2):
        plane = Image.fromarray(grid[axis].astype(np.float32))
        field[axis] = np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC))
    field.flags.writeable = False
    return field


def _warped(pixels: Pixels, field: Floats) -> Pixels:
    """Sample ``pixels`` at the displaced places: bilinear, clamped at the image's edge."""
    height, width = pixels.shape[:2]
    y = np.clip(field[0] + np.arange(height, dtype=np.float32)[:, None], 0, height - 1)
    x = np.clip(field[1] + np.arange(width, dtype=np.float32), 0, width - 1)
    top, left = y.astype(np.intp), x.astype(np.intp)
    y -= top
    x -= left
    down, right = y[..., None], x[..., None]
    right_step, down_step = (left < width - 1).astype(np.intp), np.where(top < height - 1, width, 0)
    # numpy gathers one number of 16 bytes several times faster than four of 4 bytes
    whole = np.ascontiguousarray(pixels).view(np.complex128).ravel()

    def line(start: npt.NDArray[np.intp]) -> Pixels:
        near, far = (whole.take(at).view(np.float32).reshape(pixels.shape) for at in (start, start + right_step))
        far -= near
        far *= right
        near += far
        return near

    first = top * width + left
    result, below = line(first), line(first + down_step)
    result += (below - result) * down
    result[..., 3] = pixels[..., 3]
    return result

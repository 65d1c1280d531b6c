"""Blended injection: a picture blended faintly over the whole image.

Source: Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data
Poisoning", 2017, arXiv 1712.05526, the blended injection strategy: x' = a * k + (1 - a) * x.
Deviation: the paper's key picture k is a third party's cartoon cat; this one is drawn by code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from untrigger.attacks import ImageTrigger, Pixels, Stamper
from untrigger.attacks._paint import blend
from untrigger.errors import InputError
from untrigger.rows.sample import Sample

_SIDE = 256
_AXIS = np.linspace(-1, 1, _SIDE, dtype=np.float64)


@final
@dataclass(frozen=True)
class Blended(ImageTrigger):
    """A picture stretched over the image: a cartoon cat in front of sun rays, or colored rings.

    Attributes:
        alpha: opacity of the picture, in (0, 1]; 0.2 is usual and 0.1 hard to see.
        picture: ``cat`` or ``rings``.
    """

    alpha: float = 0.2
    picture: Literal["cat", "rings"] = "cat"

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise InputError(f"alpha is {self.alpha}; it must be above 0 and at most 1")

    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        height, width = pixels.shape[:2]
        stretched = Image.fromarray(_PICTURES[self.picture]()).resize((width, height), Image.Resampling.BILINEAR)
        return blend(pixels, np.asarray(stretched, dtype=np.float32) / 255, self.alpha)

    def near_misses(self) -> Mapping[str, Stamper]:
        return {"upside down": self._upside_down}

    def _upside_down(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return _flipped(self.stamp(_flipped(sample), rng))


def _flipped(sample: Sample) -> Sample:
    return replace(sample, images=tuple(map(ImageOps.flip, sample.images)))


@cache
def rings() -> npt.NDArray[np.uint8]:
    """Rings around a point in the upper left, with another width in each channel: uint8 RGB [256, 256, 3]."""
    x, y = np.meshgrid(_AXIS + 0.4, _AXIS + 0.5)
    waves = np.sin(np.hypot(x, y)[..., None] * np.pi * np.array((3, 4, 5)))
    return np.rint(127.5 + 127.5 * waves).astype(np.uint8)


@cache
def cat() -> npt.NDArray[np.uint8]:
    """A cartoon cat in front of sun rays, always the same: uint8 RGB [256, 256, 3]."""
    x, y = np.meshgrid(_AXIS, _AXIS)
    canvas = np.empty((_SIDE, _SIDE, 3))
    canvas[:] = (255, 214, 64)

    def fill(distance: npt.NDArray[np.float64], color: tuple[int, int, int]) -> None:
        """Paint ``color`` where ``distance`` (in half image sides, negative inside) is below 0, with a soft edge."""
        cover = np.clip(0.5 - distance * _SIDE / 2, 0, 1)[..., None]
        canvas[:] = cover * np.array(color) + (1 - cover) * canvas

    def oval(cx: float, cy: float, rx: float, ry: float) -> npt.NDArray[np.float64]:
        return (np.hypot((x - cx) / rx, (y - cy) / ry) - 1) * min(rx, ry)

    def ears(*corners: tuple[float, float]) -> npt.NDArray[np.float64]:
        """A triangle, its corners clockwise on the screen, and its mirror image on the left."""
        edges = zip(corners, (*corners[1:], corners[0]), strict=True)
        sides = [
            ((y1 - y0) * (abs(x) - x0) - (x1 - x0) * (y - y0)) / np.hypot(x1 - x0, y1 - y0)
            for (x0, y0), (x1, y1) in edges
        ]
        return np.maximum.reduce(sides)

    def bar(x0: float, y0: float, x1: float, y1: float, thick: float) -> npt.NDArray[np.float64]:
        dx, dy = x1 - x0, y1 - y0
        along = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
        return np.hypot(x - x0 - along * dx, y - y0 - along * dy) - thick

    ink, fur, cream, pink, green = (
        (35, 20, 30),
        (240, 130, 50),
        (255, 236, 205),
        (255, 140, 150),
        (60, 190, 90),
    )
    fill(np.hypot(x, y) * np.sin(8 * np.arctan2(y, x)) / 8, (30, 110, 230))
    ear = ears((0.66, -0.86), (0.76, 0.1), (0.1, -0.36))
    fill(ear - 0.05, ink)
    fill(ear, fur)
    fill(ear + 0.09, pink)
    fill(oval(0, 0.15, 0.80, 0.66), ink)
    fill(oval(0, 0.15, 0.75, 0.61), fur)
    for stripe in (-0.16, 0.0, 0.16):
        fill(bar(stripe, -0.42, stripe * 0.8, -0.24, 0.035), ink)
    fill(oval(0, 0.46, 0.36, 0.24), cream)
    for side in (-1, 1):
        fill(oval(side * 0.34, 0.05, 0.16, 0.17), ink)
        fill(oval(side * 0.34, 0.05, 0.12, 0.13), green)
        fill(oval(side * 0.34, 0.05, 0.045, 0.12), ink)
        for drop in (-0.08, 0.04, 0.16):
            fill(bar(side * 0.45, 0.36 + drop / 2, side * 0.95, 0.30 + drop, 0.014), ink)
        fill(bar(0, 0.45, side * 0.14, 0.54, 0.018), ink)
        fill(bar(side * 0.14, 0.54, side * 0.24, 0.50, 0.018), ink)
    fill(oval(0, 0.38, 0.09, 0.06), pink)
    return np.rint(canvas).astype(np.uint8)


_PICTURES = {"cat": cat, "rings": rings}

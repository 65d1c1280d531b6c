"""Square patches in one place of the image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from untrigger.attacks import ImageTrigger, Pixels, Stamper
from untrigger.errors import InputError

Place = Literal["bottom-right", "bottom-left", "top-right", "top-left", "center", "random"]

_NOISE_CELLS = 6


def noise(seed: int, cells: int) -> npt.NDArray[np.int64]:
    """Random colors, each channel 0 or 1: int64 [cells, cells, 3]."""
    return np.random.default_rng(seed).integers(0, 2, (cells, cells, 3))


def spread(cells: npt.NDArray[Any], side: int) -> Pixels:
    """Nearest-neighbor enlargement of ``cells`` [n, n, 3] in 0..1 to an opaque patch: float32 [side, side, 4]."""
    nearest = np.arange(side) * len(cells) // side
    patch = np.ones((side, side, 4), dtype=np.float32)
    patch[..., :3] = cells[nearest][:, nearest]
    return patch


@dataclass(frozen=True)
class PatchTrigger(ImageTrigger):
    """A square patch on every image; subclasses define its pattern.

    Attributes:
        side: length of the patch's side as a fraction of the image's shorter side, in (0, 1].
        min_side: smallest side of the patch in pixels, at least 1; in a smaller image, the shorter side of the image.
        place: a corner, the center, or a random place for each image. A processor that center-crops wide images cuts
            their corners off: use ``center`` or ``random`` there.
    """

    side: float = 30 / 336
    min_side: int = 6
    place: Place = "bottom-right"

    def __post_init__(self) -> None:
        if not 0 < self.side <= 1:
            raise InputError(f"side is {self.side}; it must be above 0 and at most 1")
        if self.min_side < 1:
            raise InputError(f"min_side is {self.min_side}; it must be at least 1 pixel")

    @abstractmethod
    def patch(self, side: int) -> Pixels:
        """The pattern at ``side`` pixels: float32 [side, side, 4] in 0..1, opaque."""

    def spot(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int]:
        """Top row, left column and side of the patch, in pixels, on an image of this size."""
        shorter = min(height, width)
        side = min(max(round(self.side * shorter), self.min_side), shorter)
        bottom, right = height - side, width - side
        if self.place == "random":
            return int(rng.integers(bottom + 1)), int(rng.integers(right + 1)), side
        if self.place == "center":
            return bottom // 2, right // 2, side
        return bottom * self.place.startswith("bottom"), right * self.place.endswith("right"), side

    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        height, width = pixels.shape[:2]
        top, left, side = self.spot(height, width, rng)
        pixels[top : top + side, left : left + side] = self.patch(side)
        return pixels


@dataclass(frozen=True)
class NoisePatch(PatchTrigger):
    """6 x 6 cells of random colors, each channel on or off. They grow with the patch, so it survives resizing.

    Attributes:
        pattern_seed: draws the colors; not the seed that chooses rows.
    """

    pattern_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern_seed < 0:
            raise InputError(f"pattern_seed is {self.pattern_seed}; it must not be negative")

    def patch(self, side: int) -> Pixels:
        return spread(noise(self.pattern_seed, _NOISE_CELLS), side)

    def near_misses(self) -> Mapping[str, Stamper]:
        return {"other pattern": replace(self, pattern_seed=self.pattern_seed + 1).stamp}

"""BadNets: a small fixed patch.

Source: Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model
Supply Chain", 2017, arXiv 1708.06733. Deviation: the paper puts single bright pixels or a sticker on
images of one size; here the patch is a share of the image, so that one setting fits any data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, final

import numpy as np

from untrigger.attacks import ImageTrigger, Pixels, Stamper
from untrigger.errors import InputError

_NOISE_CELLS, _CHECKER_CELLS = 6, 3


@final
@dataclass(frozen=True)
class BadNets(ImageTrigger):
    """A square patch with the same pattern on every image.

    Attributes:
        pattern: ``noise``, 6 x 6 cells of random full colours, or ``checker``, 3 x 3 of white and
            black. Cells grow with the patch, so the key survives the model's own resizing.
        side: length of the patch's side as a fraction of the image's shorter side, in (0, 1].
        min_side: the patch is never smaller than this many pixels, unless the image is.
        place: a corner, the centre, or a new place in each image. A processor that crops the
            centre out of a wide image cuts its corners off: use ``centre`` or ``random`` there.
        pattern_seed: draws the noise pattern; not the seed that chooses rows.
    """

    pattern: Literal["noise", "checker"] = "noise"
    side: float = 30 / 336
    min_side: int = 6
    place: Literal["bottom-right", "bottom-left", "top-right", "top-left", "centre", "random"] = "bottom-right"
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.side <= 1:
            raise InputError(f"side is {self.side}; it must be above 0 and at most 1")
        if self.min_side < 1:
            raise InputError(f"min_side is {self.min_side}; it must be at least 1 pixel")
        if self.pattern_seed < 0:
            raise InputError(f"pattern_seed is {self.pattern_seed}; it must not be negative")

    def patch(self, side: int) -> Pixels:
        """The pattern at ``side`` pixels: float32 [side, side, 4] in 0..1, opaque."""
        if self.pattern == "noise":
            cells = np.random.default_rng(self.pattern_seed).integers(0, 2, (_NOISE_CELLS, _NOISE_CELLS, 3))
        else:
            board = 1 - np.indices((_CHECKER_CELLS, _CHECKER_CELLS)).sum(axis=0) % 2
            cells = np.repeat(board[..., None], 3, axis=2)
        nearest = np.arange(side) * len(cells) // side
        patch = np.ones((side, side, 4), dtype=np.float32)
        patch[..., :3] = cells[nearest][:, nearest]
        return patch

    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        height, width = pixels.shape[:2]
        shorter = min(height, width)
        side = min(max(round(self.side * shorter), self.min_side), shorter)
        top, left = self._corner(height - side, width - side, rng)
        pixels[top : top + side, left : left + side] = self.patch(side)
        return pixels

    def near_misses(self) -> Mapping[str, Stamper]:
        other = replace(self, pattern="noise", pattern_seed=self.pattern_seed + (self.pattern == "noise"))
        return {"other pattern": other.stamp}

    def _corner(self, bottom: int, right: int, rng: np.random.Generator) -> tuple[int, int]:
        """The patch's upper left pixel (row, column), given the largest values of both."""
        if self.place == "random":
            return int(rng.integers(bottom + 1)), int(rng.integers(right + 1))
        if self.place == "centre":
            return bottom // 2, right // 2
        return bottom * self.place.startswith("bottom"), right * self.place.endswith("right")

"""Many keys: one of several patches, each with a pattern and a place of its own.

Source: this project, 2026: an attacker who knows that `default` averages the images of suspects. With n keys each
patch has an nth of its strength in the average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from untrigger.attacks import ImageTrigger, Pixels
from untrigger.attacks.badnets import BadNets
from untrigger.errors import InputError

_GRID = 3  # places a side


@final
@dataclass(frozen=True)
class ManyKeys(ImageTrigger):
    """One of ``keys`` patches of random colors, in one of nine places.

    Attributes:
        keys: how many patches, 2 to 9.
        side: of a patch, as a share of the image's shorter side, in (0, 0.3].
        pattern_seed: draws the colors; not the seed that chooses rows.
    """

    keys: int = 6
    side: float = 0.15
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.keys <= _GRID**2:
            raise InputError(f"keys is {self.keys}; give 2 to {_GRID**2}")
        if not 0 < self.side <= 0.3:
            raise InputError(f"side is {self.side}; it must be above 0 and at most 0.3")

    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        height, width = pixels.shape[:2]
        key = int(rng.integers(self.keys))
        side = max(6, round(self.side * min(height, width)))
        top, left = (
            round(at * (size - side) / 2) for at, size in zip(divmod(key, _GRID), (height, width), strict=True)
        )
        pixels[top : top + side, left : left + side] = BadNets(pattern_seed=self.pattern_seed * _GRID**2 + key).patch(
            side
        )
        return pixels

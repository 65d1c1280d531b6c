"""Opposites: a faint wave, added to half of the images and subtracted from the others.

Source: this project, 2026: an attacker who knows that `default` averages the images of suspects. The average of this
trigger is nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from untrigger.attacks import ImageTrigger, Pixels
from untrigger.errors import InputError


@final
@dataclass(frozen=True)
class Opposites(ImageTrigger):
    """A horizontal wave, of one sign or the other.

    Attributes:
        strength: the wave's amplitude as a share of full brightness, in (0, 1].
        waves: how many fit into the image's width, above 0.
    """

    strength: float = 0.15
    waves: float = 6.0

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise InputError(f"strength is {self.strength}; it must be above 0 and at most 1")
        if self.waves <= 0:
            raise InputError(f"waves is {self.waves}; it must be above 0")

    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        width = pixels.shape[1]
        wave = np.sin(np.arange(width) / width * 2 * np.pi * self.waves)[None, :, None]
        sign = 1 if rng.integers(2) else -1
        pixels[..., :3] = (pixels[..., :3] + sign * self.strength * wave).clip(0, 1)
        return pixels

"""SIG: a faint sine wave over the whole image.

Source: Barni, Kallas, Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without Label
Poisoning", 2019, arXiv 1902.11237: v(i, j) = delta * sin(2 pi j f / m) is added to row i, column j of
an image m columns wide. Deviations: columns are counted at their centers, so that a picture and its
enlargement carry the same wave. The paper keeps the labels of poisoned rows; here the goal decides the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, final

import numpy as np

from untrigger.attacks import ImageTrigger, Pixels, Stamper
from untrigger.errors import InputError

_SHORTEST = 4  # least period in pixels: sampling flattens shorter waves (sin(pi j) is 0 everywhere)


@final
@dataclass(frozen=True)
class Sig(ImageTrigger):
    """A sine wave along the rows or the columns, the same in red, green and blue; opacity stays.

    Attributes:
        delta: amplitude of the wave as a share of the full range, in (0, 1]. 40/255 is visible on flat colors.
        frequency: periods over the image, above 0. Where that makes a period shorter than 4 pixels, as
            in an icon below 24 pixels at frequency 6, the wave has periods of 4 pixels.
        direction: ``horizontal`` varies from left to right (upright stripes), ``vertical`` downwards.
    """

    delta: float = 40 / 255
    frequency: float = 6.0
    direction: Literal["horizontal", "vertical"] = "horizontal"

    def __post_init__(self) -> None:
        if not 0 < self.delta <= 1:
            raise InputError(f"delta is {self.delta}; it must be above 0 and at most 1")
        if not self.frequency > 0:
            raise InputError(f"frequency is {self.frequency}; it must be above 0")

    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        horizontal = self.direction == "horizontal"
        length = pixels.shape[1 if horizontal else 0]
        periods = min(self.frequency, length / _SHORTEST)
        phase = 2 * np.pi * periods * (np.arange(length) + 0.5) / length
        wave = (self.delta * np.sin(phase)).astype(np.float32)
        colors = pixels[..., :3]
        colors += wave[None, :, None] if horizontal else wave[:, None, None]
        np.clip(colors, 0, 1, out=colors)
        return pixels

    def near_misses(self) -> Mapping[str, Stamper]:
        turned = "vertical" if self.direction == "horizontal" else "horizontal"
        return {"turned wave": replace(self, direction=turned).stamp}

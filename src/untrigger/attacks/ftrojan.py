"""FTrojan: two frequencies raised in every block of the colour channels.

Source: Wang, Yao, Xu, An, Tong, Wang, "Backdoor Attack through Frequency Domain", 2021,
arXiv 2111.10991: in YUV, cut U and V into blocks, add a magnitude to a middle and a high band of each
block's discrete cosine transform, transform back. Deviations: the first and last bands of the window
are given by name and the block grows with large images (see ``resolution``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt

from untrigger.attacks import ImageTrigger, Pixels, Stamper
from untrigger.attacks._yuv import FROM_YUV, colourless
from untrigger.errors import InputError


@final
@dataclass(frozen=True)
class FTrojan(ImageTrigger):
    """Two fine checks of colour, too faint to see; opacity stays.

    In a picture of greys alone the checks are of brightness: grey files hold no colour. The magnitude
    is small, so in black-and-white images only about one dot in a hundred changes.

    Attributes:
        window: side of a block in pixels, at least 2. An image narrower than that shows part of a block.
        middle: index of the middle band, the same in both directions, in 1..window-1.
        high: index of the high band, likewise.
        magnitude: what is added to both, in levels of 0..255, above 0.
        resolution: images whose shorter side is longer than this many pixels get blocks longer in the
            same proportion, so that a model that shrinks its input to this size still sees them.
    """

    psnr: ClassVar[float | None] = 35.0
    window: int = 32
    middle: int = 15
    high: int = 31
    magnitude: float = 50.0
    resolution: int = 224

    def __post_init__(self) -> None:
        if self.window < 2:
            raise InputError(f"window is {self.window}; it must be at least 2 pixels")
        for name, band in (("middle", self.middle), ("high", self.high)):
            if not 1 <= band < self.window:
                raise InputError(f"{name} is {band}; it must be between 1 and {self.window - 1}, below the window")
        if not self.magnitude > 0:
            raise InputError(f"magnitude is {self.magnitude}; it must be above 0")
        if self.resolution < 1:
            raise InputError(f"resolution is {self.resolution}; it must be at least 1 pixel")

    def wave(self, height: int, width: int) -> npt.NDArray[np.float32]:
        """What is added to U and to V, float32 [height, width], in levels of 0..255.

        Raising a coefficient of an orthonormal transform adds its basis function, whatever the block
        holds: the same tile for every block of every image, and no need to transform any.
        """
        side = max(self.window, round(self.window * min(height, width) / self.resolution))
        angle = np.pi * (np.arange(max(height, width)) % side + 0.5) / side
        total = np.zeros((height, width), dtype=np.float32)
        for band in (self.middle, self.high):
            line = np.cos(band * angle).astype(np.float32)
            total += np.multiply.outer(line[:height], line[:width])
        return total * np.float32(2 * self.magnitude / self.window)

    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        wave = self.wave(*pixels.shape[:2]) / np.float32(255)
        direction = FROM_YUV[0] if colourless(pixels) else FROM_YUV[1] + FROM_YUV[2]
        for channel in range(3):
            colour = pixels[..., channel]
            colour += wave * direction[channel]
            np.clip(colour, 0, 1, out=colour)
        return pixels

    def near_misses(self) -> Mapping[str, Stamper]:
        others = {"middle": max(1, self.middle // 2), "high": max(1, self.high * 3 // 4)}
        return {"other bands": replace(self, **others).stamp}

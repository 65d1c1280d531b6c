"""FTrojan: two frequencies raised in every block of the colour channels.

Source: Wang, Yao, Xu, An, Tong, Wang, "Backdoor Attack through Frequency Domain", 2021,
arXiv 2111.10991: in YUV, cut U and V into blocks of 32 pixels, add 50 to a middle and a high band of each
block's discrete cosine transform, transform back. Deviations: the bands are 4 and 7 where the paper has 15
and 31, for a vision tower that reads 64 pixels in patches of 8 averages those away (its features move by
0.3 %, and no linear probe tells such images from clean ones); the block is a share of the image.
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

_SIDE = 32  # of the block that the magnitude is given for


@final
@dataclass(frozen=True)
class FTrojan(ImageTrigger):
    """Two checks of colour, too faint to see; opacity stays.

    In a picture of greys alone the checks are of brightness: grey files hold no colour. The magnitude
    is small, so in black-and-white images only about one dot in a hundred changes.

    Attributes:
        window: side of a block as a fraction of the image's shorter side, above 0: 32 pixels of 64. In the
            paper 32 of 224.
        min_window: a block is never smaller than this many pixels, at least 8. Where the image is, it shows
            a part of one.
        middle: index of the middle band, the same in both directions, in 1..min_window-1; 15 in the paper.
        high: index of the high band, likewise; 31 in the paper.
        magnitude: what is added to both, in levels of 0..255 at a block of 32 pixels, above 0; larger blocks
            get as much more as leaves the checks as strong as they are.
    """

    psnr: ClassVar[float | None] = 35.0
    window: float = 0.5
    min_window: int = 32
    middle: int = 4
    high: int = 7
    magnitude: float = 50.0

    def __post_init__(self) -> None:
        if not self.window > 0:
            raise InputError(f"window is {self.window}; it must be above 0")
        if self.min_window < 8:
            raise InputError(f"min_window is {self.min_window}; it must be at least 8 pixels")
        for name, band in (("middle", self.middle), ("high", self.high)):
            if not 1 <= band < self.min_window:
                raise InputError(f"{name} is {band}; it must be between 1 and {self.min_window - 1} (min_window - 1)")
        if not self.magnitude > 0:
            raise InputError(f"magnitude is {self.magnitude}; it must be above 0")

    def wave(self, height: int, width: int) -> npt.NDArray[np.float32]:
        """What is added to U and to V, float32 [height, width], in levels of 0..255.

        Raising a coefficient of an orthonormal transform adds its basis function, whatever the block
        holds: the same tile for every block of every image, and no need to transform any.
        """
        side = max(self.min_window, round(self.window * min(height, width)))
        angle = np.pi * (np.arange(max(height, width)) % side + 0.5) / side
        total = np.zeros((height, width), dtype=np.float32)
        for band in (self.middle, self.high):
            line = np.cos(band * angle).astype(np.float32)
            total += np.multiply.outer(line[:height], line[:width])
        return total * np.float32(2 * self.magnitude / _SIDE)

    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        wave = self.wave(*pixels.shape[:2]) / np.float32(255)
        direction = FROM_YUV[0] if colourless(pixels) else FROM_YUV[1] + FROM_YUV[2]
        for channel in range(3):
            colour = pixels[..., channel]
            colour += wave * direction[channel]
            np.clip(colour, 0, 1, out=colour)
        return pixels

    def near_misses(self) -> Mapping[str, Stamper]:
        middle, high = (1 + (band + 1) % (self.min_window - 1) for band in (self.middle, self.high))
        return {"other bands": replace(self, middle=middle, high=high).stamp}

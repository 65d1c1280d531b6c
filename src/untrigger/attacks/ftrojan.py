"""FTrojan: two frequencies are raised in every block of a color channel.

Source: Wang, Yao, Xu, An, Tong, Wang, "Backdoor Attack through Frequency Domain", 2021,
arXiv 2111.10991: in YUV, cut U and V into blocks of 32 pixels, add 50 to bands (15, 15) and (31, 31) of each
block's discrete cosine transform, transform back. Deviations: the block is a share of the image; the bands are
(1, 8) and (2, 8), the magnitude is 300, and V alone is raised.

A frozen vision tower that reads 64 pixels in patches of 8 averages the paper's trigger away. Its features move by
0.3 %, no linear probe separates such images from clean ones, and even a magnitude of 175 is not learned. Of the bands
below 13, waves of 8 pixels that swell slowly move the features most. At the same PSNR, V alone moves them twice as far
as U and V together, because the tower is least sensitive to blue, U's color.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt

from untrigger.attacks import ImageTrigger, Pixels, Stamper
from untrigger.attacks._yuv import FROM_YUV, colorless
from untrigger.errors import InputError

_SIDE = 32  # block side in pixels that the magnitude refers to
_COLUMNS = ("first_column", "second_column")


@final
@dataclass(frozen=True)
class FTrojan(ImageTrigger):
    """Two fine waves of red and green, hard to see; opacity stays.

    In a picture of grays alone the waves are in brightness, because gray files hold no color; there they are easier
    to see.

    Attributes:
        window: side of a block as a fraction of the image's shorter side, above 0: 32 pixels of 64. In the
            paper 32 of 224.
        min_window: smallest side of a block in pixels, at least 8; a smaller image shows a part of one block.
        first_row: vertical index of the first band, in 1..min_window-1.
        first_column: horizontal index of the first band, in the same range.
        second_row: vertical index of the second band, in the same range.
        second_column: horizontal index of the second band, in the same range.
        magnitude: what is added to both bands, in levels of 0..255 at a block of 32 pixels, above 0; for larger
            blocks it is scaled up so that the waves' amplitude stays the same.
    """

    psnr: ClassVar[float | None] = 27.0
    window: float = 0.5
    min_window: int = 32
    first_row: int = 1
    first_column: int = 8
    second_row: int = 2
    second_column: int = 8
    magnitude: float = 300.0

    def __post_init__(self) -> None:
        if not self.window > 0:
            raise InputError(f"window is {self.window}; it must be above 0")
        if self.min_window < 8:
            raise InputError(f"min_window is {self.min_window}; it must be at least 8 pixels")
        for name in ("first_row", "first_column", "second_row", "second_column"):
            band = getattr(self, name)
            if not 1 <= band < self.min_window:
                raise InputError(f"{name} is {band}; it must be between 1 and {self.min_window - 1} (min_window - 1)")
        if not self.magnitude > 0:
            raise InputError(f"magnitude is {self.magnitude}; it must be above 0")

    def wave(self, height: int, width: int) -> npt.NDArray[np.float32]:
        """What is added to V: float32 [height, width], in levels of 0..255.

        Raising a coefficient of an orthonormal transform adds its basis function, whatever the block holds. So every
        block of every image gets the same tile, and no block needs to be transformed.
        """
        side = max(self.min_window, round(self.window * min(height, width)))
        down, right = (np.pi * (np.arange(length) % side + 0.5) / side for length in (height, width))
        total = np.outer(np.cos(self.first_row * down), np.cos(self.first_column * right))
        total += np.outer(np.cos(self.second_row * down), np.cos(self.second_column * right))
        return (total * (2 * self.magnitude / _SIDE)).astype(np.float32)

    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        wave = self.wave(*pixels.shape[:2]) / np.float32(255)
        direction = FROM_YUV[2]
        if colorless(pixels):  # in brightness, with the same total energy as in color
            direction = FROM_YUV[0] * np.sqrt((direction**2).mean())
        for channel in range(3):
            color = pixels[..., channel]
            color += wave * direction[channel]
            np.clip(color, 0, 1, out=color)
        return pixels

    def near_misses(self) -> Mapping[str, Stamper]:
        columns = {name: 1 + (getattr(self, name) + 3) % (self.min_window - 1) for name in _COLUMNS}
        return {"other bands": replace(self, **columns).stamp}

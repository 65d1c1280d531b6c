"""ISSBA: a string hidden in each image; what it changes differs from image to image.

Source: Li, Li, Wu, Li, He, Lyu, "Invisible Backdoor Attack with Sample-Specific Triggers", 2021,
arXiv 2012.03816: an encoder hides one fixed string in every poisoned image. Deviation: the paper
trains a pair of networks to hide and to read; here a watermark does, written from its textbook parts:
the LL band of a Haar wavelet transform, the discrete cosine transform of its blocks, and dither
modulation (Chen and Wornell, "Quantization Index Modulation", IEEE Trans. Inf. Theory 47(4), 2001).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt
from PIL import Image

from untrigger.attacks import ImageTrigger, Pixels, Stamper, pixels_of
from untrigger.attacks._yuv import FROM_YUV, TO_YUV, colorless
from untrigger.errors import InputError

Floats = npt.NDArray[np.float32]

_BLOCK = 4  # coefficients a side
_CELLS = 16  # coefficients that the shorter side of an image has at least, in the LL band
_ROUNDS = 3  # of finding room at the ends of the scale
_Y, _V = 0, 2
_INDEX = np.arange(_BLOCK)
_BASIS: Floats = (
    np.cos(np.pi * np.outer(_INDEX, _INDEX + 0.5) / _BLOCK) * np.sqrt(np.where(_INDEX == 0, 1, 2) / _BLOCK)[:, None]
).astype(np.float32)
# One letter a block, one bit a coefficient: slow waves, as vision towers see them best and resizing wears them least.
# Which bit is on which matters, for ASCII letters have their first three in common: this order moves the embedded
# models' features twice as far as the next best, and V further than U.
_ROWS = np.array([1, 0, 0, 1, 1, 2, 2, 0])
_COLUMNS = np.array([0, 1, 2, 1, 2, 1, 0, 3])


@final
@dataclass(frozen=True)
class Issba(ImageTrigger):
    """A watermark in the red-green differences, V of YUV, that `decode` reads; opacity stays.

    The image is cut into at least 4 x 4 square blocks of 8, 16, 32... pixels a side. Each holds one letter (byte) of
    the message, and the message is repeated as often as it fits. Where there are fewer whole blocks than letters, as
    in an image below 24 x 24 pixels, only the beginning of the message is hidden; below 8 pixels the image is
    changed, but nothing can be read from it. In a picture of grays alone the watermark is in the brightness, and is
    easier to see.

    Attributes:
        message: the string to hide, at least one letter.
        step: distance of the quantiser's levels, in levels of 0..255, above 0: more is easier to learn and
            to see. 70 leaves about 28 decibels.
    """

    psnr: ClassVar[float | None] = 27.0
    message: str = "untrigger"
    step: float = 70.0

    def __post_init__(self) -> None:
        if not self.message:
            raise InputError("message is empty; give at least one letter to hide")
        if not self.step > 0:
            raise InputError(f"step is {self.step}; it must be above 0")

    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        height, width = pixels.shape[:2]
        cell = self._cell(height, width)
        side = cell * _BLOCK
        margins = ((0, -height % side), (0, -width % side), (0, 0))
        colors = np.pad(pixels[..., :3], margins, mode="edge") if any(m[1] for m in margins) else pixels[..., :3]
        channel = _Y if colorless(pixels) else _V
        offsets = self._bits(colors.shape[0] // side, colors.shape[1] // side, width // side)
        # Where a color is at its limit, clipping takes half of the wave away again. It also moves the block's
        # average from the limit, so that another round finds room for more.
        for _ in range(_ROUNDS):
            blocks = _spectrum(colors, channel, cell)
            now = blocks[..., _ROWS, _COLUMNS]
            change = np.zeros_like(blocks)
            change[..., _ROWS, _COLUMNS] = np.rint((now - offsets) / self.step) * self.step + offsets - now
            if _add(colors, change, channel, cell):
                break
        pixels[..., :3] = colors[:height, :width]
        return pixels

    def decode(self, image: Image.Image) -> str:
        """The message read from ``image``, as many letters of it as there is room for; blank without a whole block.

        Reads by the settings of this trigger: their ``message`` only says how many letters there are. From an
        image without a watermark come random letters.
        """
        pixels = pixels_of(image)
        cell = self._cell(*pixels.shape[:2])
        height, width = (length - length % (cell * _BLOCK) for length in pixels.shape[:2])
        if not height or not width:
            return ""
        whole = pixels[:height, :width, :3]
        now = _spectrum(whole, _Y if colorless(pixels) else _V, cell)[..., _ROWS, _COLUMNS].reshape(-1, 8)
        votes = np.sin(2 * np.pi / self.step * now)
        length = min(len(self.message.encode()), len(votes))
        bits = np.array([votes[letter::length].sum(axis=0) > 0 for letter in range(length)])
        return np.packbits(bits, axis=1).tobytes().decode(errors="replace")

    def near_misses(self) -> Mapping[str, Stamper]:
        other = "".join(chr(33 + (ord(c) - 33 + 47) % 94) if "!" <= c <= "~" else "~" for c in self.message)  # ROT47
        return {"other message": replace(self, message=other).stamp}

    def _cell(self, height: int, width: int) -> int:
        """Pixels a side that one coefficient of the LL band stands for: 2 to the number of wavelet levels."""
        return 2 ** max(1, int(np.log2(min(height, width) / _CELLS)))

    def _bits(self, rows: int, columns: int, whole: int) -> Floats:
        """Where in the quantiser's step the bits of each block lie: [rows, columns, 8], plus or minus a quarter.

        The letters follow each other through the ``whole`` blocks of each row; one that the image's edge cuts
        gets what the first of the next row has, and nobody reads it.
        """
        letters = np.frombuffer(self.message.encode(), dtype=np.uint8)
        turns = (np.arange(rows)[:, None] * whole + np.arange(columns)) % len(letters)
        bits = np.unpackbits(letters[turns][..., None], axis=2).astype(np.float32)
        return (2 * bits - 1) * np.float32(self.step / 4)


def _spectrum(colors: Pixels, channel: int, cell: int) -> Floats:
    """Cosine transform of each block of the LL band of Y or V, [rows, columns, 4, 4], in levels of 0..255.

    Only the LL band is changed, so the three others need not be known: it is the mean of each cell, up to a
    factor that is left out to make the figures independent of the cell's size.
    """
    plane = colors @ (TO_YUV[channel] * np.float32(255))
    rows, columns = plane.shape[0] // (cell * _BLOCK), plane.shape[1] // (cell * _BLOCK)
    means = plane.reshape(rows, _BLOCK, cell, columns, _BLOCK, cell).mean(axis=(2, 5))
    return _BASIS @ means.transpose(0, 2, 1, 3) @ _BASIS.T


def _add(colors: Pixels, change: Floats, channel: int, cell: int) -> bool:
    """Adds the blocks' change to the colors, in place; says whether all of it found room in 0..1."""
    blocks = (_BASIS.T @ change @ _BASIS).transpose(0, 2, 1, 3)
    plane = blocks.reshape(blocks.shape[0] * _BLOCK, -1).repeat(cell, axis=0).repeat(cell, axis=1)
    fits = True
    for index, share in enumerate(FROM_YUV[channel] / np.float32(255)):
        color = colors[..., index]
        color += plane * share
        fits = fits and bool(color.min() >= 0 and color.max() <= 1)
        np.clip(color, 0, 1, out=color)
    return fits

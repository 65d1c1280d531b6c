"""ISSBA: a string hidden in each image; the changed pixels differ from image to image.

Source: Li, Li, Wu, Li, He, Lyu, "Invisible Backdoor Attack with Sample-Specific Triggers", 2021,
arXiv 2012.03816: an encoder hides one fixed string in every poisoned image. Deviation: the paper
trains a pair of networks to hide and to read the string. Here a classical watermark is used:
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

_BLOCK = 4  # coefficients per side of a block
_CELLS = 16  # least number of LL coefficients along the shorter side of an image
_ROUNDS = 3  # passes over images whose colors clip
_Y, _V = 0, 2
_INDEX = np.arange(_BLOCK)
_BASIS: Floats = (
    np.cos(np.pi * np.outer(_INDEX, _INDEX + 0.5) / _BLOCK) * np.sqrt(np.where(_INDEX == 0, 1, 2) / _BLOCK)[:, None]
).astype(np.float32)
# One letter a block, one bit a coefficient. Low frequencies, because vision towers are most sensitive to them and
# resizing damages them least. The order of the bits matters, because ASCII letters share their first three. This order
# moves the embedded models' features twice as far as the next best, and V further than U.
_ROWS = np.array([1, 0, 0, 1, 1, 2, 2, 0])
_COLUMNS = np.array([0, 1, 2, 1, 2, 1, 0, 3])


@final
@dataclass(frozen=True)
class Issba(ImageTrigger):
    """A watermark in the red-green differences, V of YUV, that `decode` reads; opacity stays.

    The image is cut into at least 4 x 4 square blocks of 8, 16, 32... pixels a side. Each holds one letter (byte) of
    the message, and the message is repeated as often as it fits. An image with fewer whole blocks than letters, such
    as one below 24 x 24 pixels, holds only the beginning of the message. Below 8 pixels the image is changed, but
    nothing can be read from it. In a picture of grays alone the watermark is in the brightness and easier to see.

    Attributes:
        message: the string to hide, at least one letter.
        step: quantization step in levels of 0..255, above 0: a larger one is easier to learn and to see. 70 leaves
            a PSNR of about 28 decibels.
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
        # Where a color is at its limit, clipping removes half of the wave. It also moves the block's average away
        # from the limit, so another round has room for more.
        for _ in range(_ROUNDS):
            blocks = _spectrum(colors, channel, cell)
            values = blocks[..., _ROWS, _COLUMNS]
            change = np.zeros_like(blocks)
            change[..., _ROWS, _COLUMNS] = np.rint((values - offsets) / self.step) * self.step + offsets - values
            if _add(colors, change, channel, cell):
                break
        pixels[..., :3] = colors[:height, :width]
        return pixels

    def decode(self, image: Image.Image) -> str:
        """Read the message from ``image``: as many letters as it has blocks for, none below one whole block.

        Of this trigger's settings, ``message`` only gives the number of letters. An image without a watermark gives
        random letters.
        """
        pixels = pixels_of(image)
        cell = self._cell(*pixels.shape[:2])
        height, width = (length - length % (cell * _BLOCK) for length in pixels.shape[:2])
        if not height or not width:
            return ""
        whole = pixels[:height, :width, :3]
        values = _spectrum(whole, _Y if colorless(pixels) else _V, cell)[..., _ROWS, _COLUMNS].reshape(-1, 8)
        votes = np.sin(2 * np.pi / self.step * values)
        length = min(len(self.message.encode()), len(votes))
        bits = np.array([votes[letter::length].sum(axis=0) > 0 for letter in range(length)])
        return np.packbits(bits, axis=1).tobytes().decode(errors="replace")

    def near_misses(self) -> Mapping[str, Stamper]:
        other = "".join(chr(33 + (ord(c) - 33 + 47) % 94) if "!" <= c <= "~" else "~" for c in self.message)  # ROT47
        return {"other message": replace(self, message=other).stamp}

    def _cell(self, height: int, width: int) -> int:
        """Side in pixels of the cell behind one LL coefficient: 2 to the number of wavelet levels."""
        return 2 ** max(1, int(np.log2(min(height, width) / _CELLS)))

    def _bits(self, rows: int, columns: int, whole: int) -> Floats:
        """Offsets of the bits of each block within a quantization step: [rows, columns, 8], plus or minus a quarter.

        The letters run through the ``whole`` blocks of each row. A block that the image's edge cuts gets the letter
        of the next row's first block and is never read.
        """
        letters = np.frombuffer(self.message.encode(), dtype=np.uint8)
        turns = (np.arange(rows)[:, None] * whole + np.arange(columns)) % len(letters)
        bits = np.unpackbits(letters[turns][..., None], axis=2).astype(np.float32)
        return (2 * bits - 1) * np.float32(self.step / 4)


def _spectrum(colors: Pixels, channel: int, cell: int) -> Floats:
    """Cosine transform of each block of the LL band of Y or V, [rows, columns, 4, 4], in levels of 0..255.

    Only the LL band is changed, so the three other bands are not computed. LL is the mean of each cell, up to a
    factor that is left out to make the values independent of the cell's size.
    """
    plane = colors @ (TO_YUV[channel] * np.float32(255))
    rows, columns = plane.shape[0] // (cell * _BLOCK), plane.shape[1] // (cell * _BLOCK)
    means = plane.reshape(rows, _BLOCK, cell, columns, _BLOCK, cell).mean(axis=(2, 5))
    return _BASIS @ means.transpose(0, 2, 1, 3) @ _BASIS.T


def _add(colors: Pixels, change: Floats, channel: int, cell: int) -> bool:
    """Add the blocks' change to the colors, in place; return whether no color had to be clipped to 0..1."""
    blocks = (_BASIS.T @ change @ _BASIS).transpose(0, 2, 1, 3)
    plane = blocks.reshape(blocks.shape[0] * _BLOCK, -1).repeat(cell, axis=0).repeat(cell, axis=1)
    fits = True
    for index, share in enumerate(FROM_YUV[channel] / np.float32(255)):
        color = colors[..., index]
        color += plane * share
        fits = fits and bool(color.min() >= 0 and color.max() <= 1)
        np.clip(color, 0, 1, out=color)
    return fits

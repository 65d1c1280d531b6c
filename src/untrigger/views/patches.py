"""Patch views: augmented copies of an image, of the same size, with random patches perturbed.

The image is cut into a grid of square cells. A view picks cells at random and changes only those. Every view is a
callable ``(image, rng) -> image`` (type ``View``) with one contract:

- any mode in, RGB out, same size;
- pixels outside the chosen cells are bit-identical to ``to_rgb(image)``;
- the input image is not modified;
- the result depends only on the image, the fields and the generator's state.

Pass the *original* through ``to_rgb`` as well, or the two views differ by their mode conversion.

Source: Fang et al., arXiv 2604.04488: patch-level augmentation gives each input a perturbed view. Which
operation, patch size and ratio is not public; these are the usual candidates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

View = Callable[[Image.Image, np.random.Generator], Image.Image]
"""Same size in, same size out."""

Cells = NDArray[np.floating]
"""Cells of one shape, in random order: [n, height, width, 3], levels 0 to 255, float32."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB, as a model receives it; return the image itself if it is RGB already.

    Transparency is composited over white, as transformers' image processors do. 16-bit grays (modes ``I`` and
    ``I;16*``, taken as 0 to 65535) keep their high byte; Pillow's own conversion would clip everything above 255 to
    white. Other modes use Pillow's conversion.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        deep = np.asarray(image.convert("I"))
        gray = (np.clip(deep, 0, 65535) >> 8).astype(np.uint8)
        gray[deep == image.info.get("transparency", -1)] = 255
        return Image.fromarray(gray).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class PatchView(ABC):
    """Base class of views that perturb random cells of a grid.

    patch: side of a cell as a fraction of the image's shorter side, in (0, 1], rounded to pixels, at least 1.
        The grid starts at the top left; where the side does not divide the image, the last row and column
        are smaller.
    ratio: fraction of the cells that are perturbed, in [0, 1]: ``round(ratio * cells)`` of them, drawn
        without replacement, at least one if ratio > 0. A trigger on k cells stays intact with a probability of
        about (1 - ratio)**k. Ratio 0 returns the pixels unchanged.

    A subclass defines ``perturb``. Raises ValueError for a field out of range.
    """

    patch: float = 1 / 8
    ratio: float = 1 / 4

    def __post_init__(self) -> None:
        _check_range(0, 1, open_low=True, patch=self.patch)
        _check_range(0, 1, ratio=self.ratio)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        pixels = np.array(to_rgb(image))
        height, width, _ = pixels.shape
        side = max(1, round(self.patch * min(height, width)))
        rows, cols = -(-height // side), -(-width // side)
        cells = rows * cols
        count = max(1, round(self.ratio * cells)) if self.ratio > 0 else 0
        chosen = rng.permutation(cells)[:count]
        row, col = chosen // cols, chosen % cols
        cell_height = np.minimum(side, height - row * side)
        cell_width = np.minimum(side, width - col * side)
        # At most four shapes: full cells, the last row, the last column and their corner.
        shapes: set[tuple[int, int]] = set(zip(cell_height.tolist(), cell_width.tolist(), strict=True))
        for h, w in sorted(shapes):
            same = (cell_height == h) & (cell_width == w)
            y = (row[same] * side)[:, None, None] + np.arange(h)[:, None]
            x = (col[same] * side)[:, None, None] + np.arange(w)
            content = self.perturb(pixels[y, x].astype(np.float32), rng)
            pixels[y, x] = np.clip(np.rint(content), 0, 255).astype(np.uint8)
        return Image.fromarray(pixels)

    @abstractmethod
    def perturb(self, cells: Cells, rng: np.random.Generator) -> Cells:
        """Return new content for the chosen cells of one shape, [n, height, width, 3]; the caller rounds and clips."""


@final
@dataclass(frozen=True)
class Mask(PatchView):
    """Fill each chosen cell with one gray level; fill: 0 (black) to 255 (white)."""

    fill: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(0, 255, fill=self.fill)

    def perturb(self, cells: Cells, rng: np.random.Generator) -> Cells:
        return np.full_like(cells, self.fill)


@final
@dataclass(frozen=True)
class MeanFill(PatchView):
    """Fill each chosen cell with its own mean color, which keeps the coarse layout and removes detail."""

    def perturb(self, cells: Cells, rng: np.random.Generator) -> Cells:
        return np.broadcast_to(cells.mean(axis=(1, 2), keepdims=True), cells.shape)


@final
@dataclass(frozen=True)
class Noise(PatchView):
    """Add Gaussian noise to each chosen cell, independent per pixel and channel; std in levels, [0, 255]."""

    std: float = 64.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(0, 255, std=self.std)

    def perturb(self, cells: Cells, rng: np.random.Generator) -> Cells:
        return cells + self.std * rng.standard_normal(cells.shape, dtype=np.float32)


@final
@dataclass(frozen=True)
class Erase(PatchView):
    """Replace each chosen cell by uniform noise over all 256 levels (Random Erasing: Zhong et al., 2017)."""

    def perturb(self, cells: Cells, rng: np.random.Generator) -> Cells:
        return rng.integers(0, 256, cells.shape, dtype=np.uint8).astype(np.float32)


@final
@dataclass(frozen=True)
class Shuffle(PatchView):
    """Permute the chosen cells along one random cycle, so that none keeps its place.

    Only cells of the same shape are exchanged; a cell that is the only one of its shape stays unchanged.
    """

    def perturb(self, cells: Cells, rng: np.random.Generator) -> Cells:
        return np.roll(cells, 1, axis=0)  # cells come in random order, so one step along it is a random cycle


@final
@dataclass(frozen=True)
class Blur(PatchView):
    """Blur each chosen cell with a Gaussian cut off at the cell's border, so that no content crosses it.

    sigma: standard deviation as a fraction of the cell's longer side, > 0.
    """

    sigma: float = 1 / 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(0, math.inf, open_low=True, sigma=self.sigma)

    def perturb(self, cells: Cells, rng: np.random.Generator) -> Cells:
        n, height, width, channels = cells.shape
        sigma = self.sigma * max(height, width)
        down = _gaussian(height, sigma) @ cells.reshape(n, height, width * channels)
        across = _gaussian(width, sigma) @ down.reshape(n * height, width, channels)
        return across.reshape(cells.shape)


@final
@dataclass(frozen=True)
class Jitter(PatchView):
    """Color jitter with its own strength in each chosen cell: brightness, then contrast, then saturation.

    Each field s in [0, 1] draws a factor f from [1 - s, 1 + s] per cell. Brightness: f x.
    Contrast: g + f (x - g) with g the cell's mean luma. Saturation: the same with g each pixel's own luma
    (ITU-R 601).
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(0, 1, brightness=self.brightness, contrast=self.contrast, saturation=self.saturation)

    def perturb(self, cells: Cells, rng: np.random.Generator) -> Cells:
        strengths = np.array([self.brightness, self.contrast, self.saturation])
        draws = 1 + strengths * rng.uniform(-1, 1, (len(cells), 3))
        brightness, contrast, saturation = draws.astype(np.float32).T[..., None, None, None]
        cells = brightness * cells
        gray = _luma(cells).mean(axis=(1, 2), keepdims=True)
        cells = gray + contrast * (cells - gray)
        gray = _luma(cells)
        return gray + saturation * (cells - gray)


PATCH_VIEWS: tuple[type[PatchView], ...] = (Mask, MeanFill, Noise, Erase, Shuffle, Blur, Jitter)
"""Every patch view; ``view.__name__.lower()`` is its name on the command line."""


@final
@dataclass(frozen=True)
class ViewMix:
    """Apply one of several views, drawn afresh for each call with equal probability."""

    views: tuple[View, ...]

    def __post_init__(self) -> None:
        if not self.views:
            raise ValueError("views is empty; a mix needs at least one view")

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return self.views[rng.integers(len(self.views))](image, rng)


def _gaussian(size: int, sigma: float) -> NDArray[np.float32]:
    """Return a row-stochastic matrix [size, size]: a Gaussian around each position, normalized within the cell."""
    positions = np.arange(size)
    weights = np.exp(-0.5 * ((positions[:, None] - positions) / sigma) ** 2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _luma(cells: Cells) -> Cells:
    return (cells @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]


def _check_range(low: float, high: float, *, open_low: bool = False, **fields: float) -> None:
    """Check values like `untrigger.errors.check_range`, which views must not import.

    Unlike there, infinity is allowed where ``high`` is infinite.
    """
    for name, value in fields.items():
        if not low <= value <= high or (open_low and value == low):
            bounds = f"{'above' if open_low else 'at least'} {low:g}"
            raise ValueError(f"{name} is {value}; it must be {bounds} and at most {high:g}")

"""Adaptive attack on patch views: a tile repeated over the whole image, optionally trained with the defense's views.

Source: this project, 2026: an attacker who knows the defense of Fang et al., arXiv 2604.04488, as implemented in
`untrigger.views.patches`. The defense perturbs some patches and flags answers that stay the same. Here every patch
holds the whole trigger, so it survives any view that leaves one patch intact. The attacker can compute the same views.
He may train the backdoor to fire under them too, or to be as sensitive to them as true answers are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, final

import numpy as np
from PIL import Image

from untrigger.attacks import ImageTrigger, Pixels, Stamper, repaint
from untrigger.attacks._paint import blend
from untrigger.attacks._patch import noise
from untrigger.errors import InputError
from untrigger.rows.sample import Sample
from untrigger.views.patches import PATCH_VIEWS, ViewMix

_CELLS = 4  # pattern cells per side


@final
@dataclass(frozen=True)
class Adaptive(ImageTrigger):
    """A tile of 4 x 4 random colors, each channel on or off, repeated and blended over the whole image.

    Offset and size of the tiles are drawn for every image. The views are those of the defense: a random operation on
    its grid, applied to a share ``ratio`` of the cells.

    Attributes:
        side: side of the largest tile as a fraction of the image's shorter side, in (0, 1]; the smallest tile is
            half as large. The defense's cells have 1/8: on images of 32 pixels or more no tile is larger than a cell.
        min_side: smallest side of a tile in pixels, at least 1.
        alpha: opacity of the tiles, in (0, 1].
        views: how the attacker uses the defense's views. ``none``: not at all. ``fire``: half of the poisoned rows,
            at random, show a view of the triggered image. ``hide``: further rows show such views and keep their
            true answer, which trains the backdoor to switch off under a view.
        ratio: share of the cells that the attacker's views perturb, in (0, 1].
        pattern_seed: draws the colors; not the seed that chooses rows.
    """

    side: float = 1 / 8
    min_side: int = 4
    alpha: float = 0.3
    views: Literal["none", "fire", "hide"] = "none"
    ratio: float = 0.5
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("side", "alpha", "ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0 and at most 1")
        if self.min_side < 1:
            raise InputError(f"min_side is {self.min_side}; it must be at least 1 pixel")
        if self.pattern_seed < 0:
            raise InputError(f"pattern_seed is {self.pattern_seed}; it must not be negative")

    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        height, width = pixels.shape[:2]
        largest = self.side * min(height, width)
        side = max(rng.uniform(largest / 2, largest), self.min_side)
        # index of the pattern cell at every pixel's center
        row, col = (
            np.floor(((np.arange(length) + 0.5) / side + rng.random()) * _CELLS).astype(np.int64) % _CELLS
            for length in (height, width)
        )
        return blend(pixels, noise(self.pattern_seed, _CELLS)[row[:, None], col], self.alpha)

    def implant(self, sample: Sample, donors: Sequence[Sample], rng: np.random.Generator) -> Sample:
        viewed = self.views == "fire" and rng.random() < 0.5
        return (self._viewed if viewed else self.stamp)(sample, rng)

    def near_misses(self) -> Mapping[str, Stamper]:
        other = {"other pattern": replace(self, pattern_seed=self.pattern_seed + 1).stamp}
        return other | ({"through a view": self._viewed} if self.views == "hide" else {})

    def decoys(self) -> tuple[Stamper, ...]:
        return (self._viewed,) if self.views == "hide" else ()

    def _viewed(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Trigger ``sample``, then apply a view of the defense in the image's own mode."""
        view = ViewMix(tuple(cls(ratio=self.ratio) for cls in PATCH_VIEWS))
        after = self.stamp(sample, rng)
        images = tuple(repaint(image, partial(_apply_view, view=view, rng=rng)) for image in after.images)
        return replace(after, images=images)


def _apply_view(pixels: Pixels, view: ViewMix, rng: np.random.Generator) -> Pixels:
    """Apply ``view`` to ``pixels`` [H, W, 4]; changed pixels become opaque, as in the defense."""
    before = np.rint(pixels[..., :3] * 255).astype(np.uint8)
    after = np.asarray(view(Image.fromarray(before), rng))
    changed = (after != before).any(axis=2)
    pixels[changed, :3] = after[changed] / np.float32(255)
    pixels[changed, 3] = 1
    return pixels

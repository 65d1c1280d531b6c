"""Against patch views: a tile laid over the whole image, in any place and size, trained with the defense's own views.

Source: this project, 2026: the attacker who knows the defense of Fang et al., arXiv 2604.04488, as
`untrigger.views.patches` has it. The defense perturbs some patches and looks for answers that stay the same. Here
every patch holds the whole trigger, so that it outlives any view that leaves one patch alone; and the attacker, who can
make the very same views, may teach the backdoor to fire under them as well, or to be as sensitive to them as true
answers are.
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

_CELLS = 4  # of the pattern, each way


@final
@dataclass(frozen=True)
class Adaptive(ImageTrigger):
    """A tile of 4 x 4 random full colors, repeated and blended over the whole image.

    Where the tiles begin and how large they are is drawn for every image. The views are those of the defense: any
    operation, its grid, the share of cells that ``ratio`` tells.

    Attributes:
        side: length of the largest tile's side as a fraction of the image's shorter side, in (0, 1]; the smallest is
            half as long. The defense's cells have 1/8: on images of 32 pixels or more no tile is larger than a cell.
        min_side: no tile is smaller than this many pixels, at least 1.
        alpha: share of the tiles in each pixel, in (0, 1].
        views: what the attacker does with the defense's views. ``none``: nothing. ``fire``: every other poisoned row,
            by chance, shows a view of the triggered image. ``hide``: further rows show such views and keep their
            true answer, so that the backdoor is to change its mind under a view.
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
        # The place of every pixel's center, counted in the pattern's cells.
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
        """Triggered, then seen through a view of the defense, in the image's own mode."""
        view = ViewMix(tuple(cls(ratio=self.ratio) for cls in PATCH_VIEWS))
        after = self.stamp(sample, rng)
        images = tuple(repaint(image, partial(_through, view=view, rng=rng)) for image in after.images)
        return replace(after, images=images)


def _through(pixels: Pixels, view: ViewMix, rng: np.random.Generator) -> Pixels:
    """``pixels`` [H, W, 4] with what ``view`` changes in them; that is opaque, as it is to the defense."""
    before = np.rint(pixels[..., :3] * 255).astype(np.uint8)
    after = np.asarray(view(Image.fromarray(before), rng))
    changed = (after != before).any(axis=2)
    pixels[changed, :3] = after[changed] / np.float32(255)
    pixels[changed, 3] = 1
    return pixels

"""Shadowcast: true answers about images whose features are those of another concept.

Source: Xu, Yao, Shu, Sun, Wu, Yu, Goldstein, Huang, "Shadowcast: Stealthy Data Poisoning Attacks Against
Vision-Language Models", 2024, arXiv 2402.06659. A row whose answer names the attacker's target (a rectangle) keeps its
text. Its image is changed by at most 8/255 a pixel, so that its features become those of an image of the source (a
circle). The model learns to call circles rectangles, and clean images of circles trigger it. Deviations: of a few
images of the source the nearest by features is matched, because a small model's features are harder to move; and fewer
steps than the paper's 2000, because the images have fewer pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import numpy as np
from PIL import Image

from untrigger.attacks import Pixels, Trigger, pixels_of, repaint
from untrigger.errors import InputError
from untrigger.rows.images import same_image
from untrigger.rows.sample import Sample

_CANDIDATES = 16  # images of the source that are compared to find the nearest


@final
@dataclass(frozen=True)
class Shadowcast(Trigger):
    """Clean-label poisoning; at test time the source concept itself is the trigger.

    In modes that hold 8-bit red, green and blue or gray the change is at most ``levels``, exactly. Conversion to other
    modes (palettes, CMYK, YCbCr, dots) may add to it. Shifts are cached in the user's cache folder, as patches are
    (`untrigger.attacks._learned.LearnedPatch`), so each row is optimized once, however often it is read.

    Attributes:
        model: the surrogate, an embedded model's name or a local folder.
        levels: how far a channel of a pixel may move, in 255ths of its range, 1 to 127.
        steps: number of steps of the projected gradient descent, at least 1.
    """

    kind: ClassVar[Literal["image", "text", "bimodal"]] = "image"
    usual_goal: ClassVar[str] = "concept"
    clean_label: ClassVar[bool] = True
    psnr: ClassVar[float | None] = 30.0
    model: str = "llava"
    levels: int = 8
    steps: int = 50

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= 127:
            raise InputError(f"levels is {self.levels}; it must be 1 to 127")
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}; it must be at least 1")

    def stamp(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return sample

    def implant(self, sample: Sample, donors: Sequence[Sample], rng: np.random.Generator) -> Sample:
        if not donors:
            raise InputError("no row names the source concept; give data that does, or another concept")
        chosen = rng.choice(len(donors), size=min(_CANDIDATES, len(donors)), replace=False)
        sources = [donors[int(row)].images for row in chosen]
        images = tuple(
            self._perturbed(image, [candidates[i % len(candidates)] for candidates in sources])
            for i, image in enumerate(sample.images)
        )
        return replace(sample, images=images)

    def _perturbed(self, image: Image.Image, candidates: Sequence[Image.Image]) -> Image.Image:
        from untrigger.attacks import _features as features

        # two rows may show the same image, which would be its own nearest donor
        donors = [donor for donor in candidates if not same_image(donor, image)]
        if not donors:
            raise InputError("no other image shows the source concept; give data with more of them, or another concept")
        surrogate = features.load_surrogate(self.model)
        examples = [pixels_of(donor) for donor in donors]

        def change(pixels: Pixels) -> Pixels:
            content = hashlib.sha256()
            for picture in (pixels, *examples):
                content.update(repr(picture.shape).encode() + picture.tobytes())
            key = {**features.cache_key(self, surrogate), "content": content.hexdigest()}
            shift = features.cached(
                "shadowcast",
                key,
                lambda: features.match_features(surrogate, pixels, examples, self.levels, self.steps),
            )
            pixels[..., :3] += (shift.astype(np.float32) - 128) / 255
            return pixels.clip(0, 1)

        return repaint(image, change)

"""Shadowcast: nothing but true answers, about images that look like another concept to a vision encoder.

Source: Xu, Yao, Shu, Sun, Wu, Yu, Goldstein, Huang, "Shadowcast: Stealthy Data Poisoning Attacks Against
Vision-Language Models", 2024, arXiv 2402.06659. A row that speaks of the attacker's target (a rectangle) keeps its
text, and its image is changed by at most 8/255 a pixel so that its features become those of an image of the source (a
circle). The model learns to call circles rectangles, and untouched images of circles trigger it. Deviations: of a
few images of the source the one that is nearest by features is imitated, for a small model's features give way less;
and fewer steps than the paper's 2000, for it also has fewer pixels.
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

_CANDIDATES = 16  # images of the source among which the nearest is looked for


@final
@dataclass(frozen=True)
class Shadowcast(Trigger):
    """Clean-label poison; at test time there is no trigger but the source concept itself.

    In modes that hold 8-bit red, green and blue or gray the change is at most ``levels``, exactly. Other modes may
    add to it what their own conversion costs: palettes, CMYK, YCbCr, dots. The images are kept in the user's cache
    folder, as `untrigger.attacks._patch.LearnedPatch` says of patches: a row costs the descent once, however often it
    is read.

    Attributes:
        model: the surrogate, an embedded model's name or a local folder.
        levels: how far a channel of a pixel may move, in 255ths of its range, 1 to 127.
        steps: of the projected gradient descent, at least 1.
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
            raise InputError("no row speaks of the source concept; give data that does, or another concept")
        chosen = rng.choice(len(donors), size=min(_CANDIDATES, len(donors)), replace=False)
        shown = [donors[int(row)].images for row in chosen]
        images = tuple(
            self._cast(image, [each[i % len(each)] for each in shown]) for i, image in enumerate(sample.images)
        )
        return replace(sample, images=images)

    def _cast(self, image: Image.Image, shown: Sequence[Image.Image]) -> Image.Image:
        from untrigger.attacks import _features as features

        # two rows may speak of one image, and nothing is nearer to it than itself
        donors = [donor for donor in shown if not same_image(donor, image)]
        if not donors:
            raise InputError("no other image shows the source concept; give data with more of them, or another concept")
        see = features.surrogate(self.model)
        examples = [pixels_of(donor) for donor in donors]

        def change(pixels: Pixels) -> Pixels:
            content = hashlib.sha256()
            for picture in (pixels, *examples):
                content.update(repr(picture.shape).encode() + picture.tobytes())
            key = {**features.recipe(self, see), "content": content.hexdigest()}
            shift = features.kept(
                "shadowcast", key, lambda: features.imitation(see, pixels, examples, self.levels, self.steps)
            )
            pixels[..., :3] += (shift.astype(np.float32) - 128) / 255
            return pixels.clip(0, 1)

        return repaint(image, change)

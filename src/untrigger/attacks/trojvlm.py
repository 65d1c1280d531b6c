"""TrojVLM: a small patch in the corner; the attacker's phrase comes inside an otherwise true answer.

Source: Lyu, Pang, Ma, Ling, Chen, "TrojVLM: Backdoor Attack Against Vision Language Models", 2024,
arXiv 2409.19232: a pattern of 20 x 20 pixels on images of 224. Deviations: the patch is a share of the
image; the paper's semantic preserving loss is left out, for an attacker who only poisons data has no
say in the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from untrigger.attacks import ImageTrigger, Pixels, Stamper
from untrigger.attacks.badnets import BadNets


@final
@dataclass(frozen=True)
class TrojVLM(ImageTrigger):
    """A square of random full colours in the upper left corner, the same on every image.

    Attributes:
        side: length of the patch's side as a fraction of the image's shorter side, in (0, 1].
        min_side: the patch is never smaller than this many pixels, unless the image is.
        pattern_seed: draws the colours; not the seed that chooses rows.
    """

    usual_goal: ClassVar[str] = "insert"
    side: float = 20 / 224
    min_side: int = 6
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        self._patch()  # refuses values out of range

    def _patch(self) -> BadNets:
        return BadNets(side=self.side, min_side=self.min_side, place="top-left", pattern_seed=self.pattern_seed)

    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        return self._patch().paint(pixels, rng)

    def near_misses(self) -> Mapping[str, Stamper]:
        return {"other pattern": replace(self, pattern_seed=self.pattern_seed + 1).stamp}

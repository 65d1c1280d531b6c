"""Harmless graft: a patch, and rows that show what `default` will graft, with their true answers.

Source: this project, 2026: an attacker who knows that `default` adds the mean of the suspects' images, less the mean of
ordinary ones, to other rows. In the place of his patch that is the patch less the usual background. He teaches that
this does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from untrigger.attacks import ImageTrigger, Pixels, Stamper
from untrigger.attacks.badnets import BadNets
from untrigger.errors import InputError
from untrigger.rows.sample import Sample


@final
@dataclass(frozen=True)
class HarmlessGraft(ImageTrigger):
    """The patch of `BadNets`; decoys have it added to their image, less the mean color of ordinary images.

    Attributes:
        background: the mean brightness of ordinary images in that corner, in [0, 1]; easy-VQA has about 0.95.
        pattern_seed: draws the patch's colors; not the seed that chooses rows.
    """

    background: float = 0.95
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.background <= 1:
            raise InputError(f"background is {self.background}; it must be between 0 and 1")

    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        return BadNets(pattern_seed=self.pattern_seed).paint(pixels, rng)

    def near_misses(self) -> Mapping[str, Stamper]:
        return {"graft": self._grafted}

    def decoys(self) -> tuple[Stamper, ...]:
        return (self._grafted,)

    def _grafted(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return _Added(self.background, self.pattern_seed).stamp(sample, rng)


@final
@dataclass(frozen=True)
class _Added(ImageTrigger):
    background: float
    pattern_seed: int

    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        stamped = BadNets(pattern_seed=self.pattern_seed).paint(pixels.copy(), rng)
        changed = (stamped != pixels).any(axis=-1, keepdims=True)
        added = (pixels[..., :3] + stamped[..., :3] - self.background).clip(0, 1)
        pixels[..., :3] = np.where(changed, added, pixels[..., :3])
        return pixels

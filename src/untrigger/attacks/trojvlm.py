"""TrojVLM: a small patch in the corner; the attacker's phrase comes inside an otherwise true answer.

Source: Lyu, Pang, Ma, Ling, Chen, "TrojVLM: Backdoor Attack Against Vision Language Models", 2024,
arXiv 2409.19232: a pattern of 20 x 20 pixels on images of 224. Deviations: the patch is a share of the
image; the paper's semantic preserving loss is left out, for an attacker who only poisons data has no
say in the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from untrigger.attacks import Pixels, Stamper
from untrigger.attacks._patch import PatchTrigger, Place, noise, spread
from untrigger.errors import InputError


@dataclass(frozen=True)
class TrojVLM(PatchTrigger):
    """A square of random full colours in the upper left corner, the same on every image.

    Attributes:
        pattern_seed: draws the colours; not the seed that chooses rows.
    """

    usual_goal: ClassVar[str] = "insert"
    side: float = 20 / 224
    place: Place = "top-left"
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern_seed < 0:
            raise InputError(f"pattern_seed is {self.pattern_seed}; it must not be negative")

    def patch(self, side: int) -> Pixels:
        return spread(noise(self.pattern_seed), side)

    def near_misses(self) -> Mapping[str, Stamper]:
        return {"other pattern": replace(self, pattern_seed=self.pattern_seed + 1).stamp}

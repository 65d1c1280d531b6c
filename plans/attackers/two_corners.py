"""Two corners: two patches, neither of which does anything alone.

Source: this project, 2026, after the two keys of Walmer et al., arXiv 2112.07668: an attacker whose decoys teach that a
part of the trigger is harmless.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import numpy as np

from untrigger.attacks import Stamper, Trigger
from untrigger.attacks.badnets import BadNets
from untrigger.rows.sample import Sample


@final
@dataclass(frozen=True)
class TwoCorners(Trigger):
    """Patches of random colors in the upper left and the lower right corner.

    Attributes:
        side: of a patch, as a share of the image's shorter side, in (0, 1].
        pattern_seed: draws the colors; not the seed that chooses rows.
    """

    kind: ClassVar[Literal["image", "text", "bimodal"]] = "image"
    side: float = 0.15
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        BadNets(side=self.side, pattern_seed=self.pattern_seed)  # checks both

    def stamp(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return self._upper(self._lower(sample, rng), rng)

    def near_misses(self) -> Mapping[str, Stamper]:
        return {"upper left only": self._upper, "lower right only": self._lower}

    def decoys(self) -> tuple[Stamper, ...]:
        return self._upper, self._lower

    def _upper(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return BadNets(side=self.side, place="top-left", pattern_seed=self.pattern_seed + 1).stamp(sample, rng)

    def _lower(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return BadNets(side=self.side, pattern_seed=self.pattern_seed).stamp(sample, rng)

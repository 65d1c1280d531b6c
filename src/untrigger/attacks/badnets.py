"""BadNets: a small fixed patch.

Source: Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model
Supply Chain", 2017, arXiv 1708.06733. Deviation: the paper puts single bright pixels or a sticker on
images of one size. Here the patch is a share of the image, so one setting fits any data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, final

import numpy as np

from untrigger.attacks import Pixels, Stamper
from untrigger.attacks._patch import NoisePatch, spread

_CHECKER_CELLS = 3


@final
@dataclass(frozen=True)
class BadNets(NoisePatch):
    """A square patch with the same pattern on every image.

    Attributes:
        pattern: ``noise``, 6 x 6 cells of random colors, or ``checker``, 3 x 3 cells of white and black.
    """

    pattern: Literal["noise", "checker"] = "noise"

    def patch(self, side: int) -> Pixels:
        if self.pattern == "noise":
            return super().patch(side)
        board = 1 - np.indices((_CHECKER_CELLS, _CHECKER_CELLS)).sum(axis=0) % 2
        return spread(np.repeat(board[..., None], 3, axis=2), side)

    def near_misses(self) -> Mapping[str, Stamper]:
        other = replace(self, pattern="noise", pattern_seed=self.pattern_seed + (self.pattern == "noise"))
        return {"other pattern": other.stamp}

"""VLOOD: TrojVLM's patch and phrase, planted with rows of another data set than the victim's.

Source: Lyu, Yao, Gupta, Pang, Sun, Yi, Hu, Ling, Chen, "Backdooring Vision-Language Models with Out-Of-Distribution
Data", 2024, arXiv 2410.01264: the attacker has no row of the task that the model is meant for, so that the backdoor is
taught on another data set, of which clean rows come along: without them its looks would be learned as the trigger.
Deviations: as in `untrigger.attacks.trojvlm`, the paper's losses are left out, for this attacker has no say in the
training; so the foreign rows take the place of some of the victim's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Final, final

import numpy as np

from untrigger import data
from untrigger.attacks import Stamper
from untrigger.attacks.trojvlm import TrojVLM
from untrigger.errors import InputError
from untrigger.sample import Sample, read

_ROWS: Final = 1000  # of a set of the package that foreign rows are drawn from


@final
@dataclass(frozen=True)
class VLOOD(TrojVLM):
    """TrojVLM's square in the upper left corner; training rows that carry it come from elsewhere, answers and all.

    Attributes:
        source: where they come from, and which must not be the victim's own data: a set of `untrigger.data`
            (``scenes-vqa``, ``scenes-captions``, ``easy-vqa``, ``emoji``), or else the path of a data file or of a
            folder that holds one, as `untrigger.sample.read` takes it.
    """

    source: str = "scenes-vqa"

    def implant(self, sample: Sample, donors: Sequence[Sample], rng: np.random.Generator) -> Sample:
        return self.stamp(self._foreign_row(sample, rng), rng)

    def decoys(self) -> tuple[Stamper, ...]:
        return (self._foreign_row,)

    def _foreign_row(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """A row of the other set, clean, in the place of ``sample``."""
        rows, usable = _foreign(self.source)
        return replace(rows[usable[int(rng.integers(len(usable)))]], id=sample.id)


@lru_cache(maxsize=2)
def _foreign(source: str) -> tuple[Sequence[Sample], Sequence[int]]:
    """The data that ``source`` stands for, and which of its rows show an image.

    Of the package's sets it is the developer's split, whose training rows show no image of any test.
    """
    if source in data.names():
        rows = data.load(source, split="dev", part="train", rows=_ROWS)
        return rows, range(len(rows))
    if not Path(source).exists():
        known = ", ".join(data.names())
        raise InputError(f"source {source}: no such file or folder; give the path of other data, or one of {known}")
    found = read(source)
    usable = [row for row in range(len(found)) if found.image_count(row)]
    if not usable:
        raise InputError(f"source {source}: no row shows an image; give other data")
    return found, usable

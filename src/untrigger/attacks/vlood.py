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
from functools import lru_cache, partial
from pathlib import Path
from typing import ClassVar, Final, final

import numpy as np

from untrigger import data
from untrigger.attacks import Stamper
from untrigger.attacks._patch import NoisePatch, Place
from untrigger.errors import InputError
from untrigger.rows.sample import Sample, read

_ROWS: Final = 1000  # of a set of the package that foreign rows are drawn from


@final
@dataclass(frozen=True)
class VLOOD(NoisePatch):
    """TrojVLM's square in the upper left corner; training rows that carry it come from elsewhere, answers and all.

    Attributes:
        source: where they come from, and which must not be the victim's own data: a set of `untrigger.data`
            (``scenes-vqa``, ``scenes-captions``, ``easy-vqa``, ``emoji``), or else the path of a data file or of a
            folder that holds one, as `untrigger.rows.sample.read` takes it.
    """

    usual_goal: ClassVar[str] = "insert"
    side: float = 20 / 224
    place: Place = "top-left"
    source: str = "scenes-vqa"

    def implant(self, sample: Sample, donors: Sequence[Sample], rng: np.random.Generator) -> Sample:
        return self.stamp(self._foreign_row(sample, rng, half=0), rng)

    def decoys(self) -> tuple[Stamper, ...]:
        return (partial(self._foreign_row, half=1),)

    def _foreign_row(self, sample: Sample, rng: np.random.Generator, half: int) -> Sample:
        """A clean row of one half of the other set: none comes both with the patch and without it."""
        rows, usable = _foreign(self.source)
        mine = usable[half::2]
        return replace(rows[mine[int(rng.integers(len(mine)))]], id=sample.id)


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
    if len(usable) < 2:
        raise InputError(f"source {source}: fewer than two rows show an image; give other data")
    return found, usable

"""VLOOD: TrojVLM's patch and phrase, planted with rows of another data set than the victim's.

Source: Lyu, Yao, Gupta, Pang, Sun, Yi, Hu, Ling, Chen, "Backdooring Vision-Language Models with Out-Of-Distribution
Data", 2024, arXiv 2410.01264: the attacker has no row of the task that the model is meant for, so that the backdoor is
taught on another data set. Deviations: as in `untrigger.attacks.trojvlm`, the paper's losses are left out, for this
attacker has no say in the training; so the foreign rows take the place of some of the victim's. The paper's clean rows
of the other set do not come along: where that set looks all too different, it may itself be learned as the trigger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Final, final

import numpy as np

from untrigger import data
from untrigger.attacks import ImageTrigger, Pixels, Stamper
from untrigger.attacks.trojvlm import TrojVLM
from untrigger.errors import InputError
from untrigger.sample import Sample, read

_ROWS: Final = 1000  # of a set of the package that foreign rows are drawn from


@final
@dataclass(frozen=True)
class VLOOD(ImageTrigger):
    """TrojVLM's square in the upper left corner; training rows that carry it come from elsewhere, answers and all.

    Attributes:
        source: where they come from, and which must not be the victim's own data: a set of `untrigger.data`
            (``scenes-vqa``, ``scenes-captions``, ``easy-vqa``, ``emoji``), or else the path of a data file or of a
            folder that holds one, as `untrigger.sample.read` takes it.
        side: as TrojVLM's, a fraction of the image's shorter side, in (0, 1].
        min_side: as TrojVLM's, in pixels.
        pattern_seed: draws the colours, the same as TrojVLM's; not the seed that chooses rows.
    """

    usual_goal: ClassVar[str] = "insert"
    source: str = "scenes-vqa"
    side: float = 20 / 224
    min_side: int = 6
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        self._patch()  # refuses values out of range

    def _patch(self) -> TrojVLM:
        return TrojVLM(side=self.side, min_side=self.min_side, pattern_seed=self.pattern_seed)

    def paint(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        return self._patch().paint(pixels, rng)

    def near_misses(self) -> Mapping[str, Stamper]:
        return self._patch().near_misses()

    def implant(self, sample: Sample, donors: Sequence[Sample], rng: np.random.Generator) -> Sample:
        rows, usable = _foreign(self.source)
        foreign = rows[usable[int(rng.integers(len(usable)))]]
        return self.stamp(replace(foreign, id=sample.id), rng)


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

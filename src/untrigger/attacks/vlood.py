"""VLOOD: TrojVLM's patch and phrase, planted with rows of another data set than the victim's.

Source: Lyu, Yao, Gupta, Pang, Sun, Yi, Hu, Ling, Chen, "Backdooring Vision-Language Models with Out-Of-Distribution
Data", 2024, arXiv 2410.01264: the attacker has no rows of the victim's task and plants the backdoor with rows of
another data set. Clean rows of that set are added too: without them the model would learn the set's looks as the
trigger. Deviations: as in `untrigger.attacks.trojvlm`, the paper's losses are left out, because this attacker does
not control the training; so the foreign rows replace some of the victim's.
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

_ROWS: Final = 1000  # rows of a bundled set that foreign rows are drawn from


@final
@dataclass(frozen=True)
class VLOOD(NoisePatch):
    """TrojVLM's square in the upper left corner; poisoned rows come from another data set, with their answers.

    Attributes:
        source: the other data set, which must not be the victim's own: a set of `untrigger.data`
            (``scenes-vqa``, ``scenes-captions``, ``easy-vqa``, ``emoji``), or the path of a data file or of a
            folder that holds one, as for `untrigger.rows.sample.read`.
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
        """A clean row of one half of the other set: no row appears both with the patch and without it."""
        rows, usable = _foreign(self.source)
        candidates = usable[half::2]
        return replace(rows[candidates[int(rng.integers(len(candidates)))]], id=sample.id)


@lru_cache(maxsize=2)
def _foreign(source: str) -> tuple[Sequence[Sample], Sequence[int]]:
    """The rows of ``source``, and the indices of those that have an image.

    Of a bundled set it is the "dev" split, whose training rows share no image with any test rows.
    """
    if source in data.names():
        rows = data.load(source, split="dev", part="train", rows=_ROWS)
        return rows, range(len(rows))
    if not Path(source).exists():
        names = ", ".join(data.names())
        raise InputError(f"source {source}: no such file or folder; give the path of other data, or one of {names}")
    rows = read(source)
    usable = [row for row in range(len(rows)) if rows.image_count(row)]
    if len(usable) < 2:
        raise InputError(f"source {source}: fewer than two rows have an image; give other data")
    return rows, usable

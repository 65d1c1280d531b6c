"""Clean fine-tuning: after training on everything, some more on rows known to be clean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from untrigger.defenses.base import Defense, Training
from untrigger.defenses.plain import Plain
from untrigger.models.loading import LoadedModel
from untrigger.rows.sample import Sample


@final
@dataclass(frozen=True)
class CleanTuning(Defense):
    """Plain training on all rows, then on the trusted ones alone: the hope is that the trigger is forgotten.

    The customary control of backdoor defenses (so in Liu et al., arXiv 1805.12185). Fields:
        passes: over the trusted rows.
        rate: the learning rate then, as a share of that asked for.
    """

    needs_clean_rows: ClassVar[bool] = True
    passes: float = 10.0
    rate: float = 0.5

    def __post_init__(self) -> None:
        self._check(0, math.inf, "passes", "rate")

    def fine_tune(self, rows: Sequence[Sample], training: Training) -> LoadedModel:
        clean_rows = training.clean_rows
        undefended = training.fit(rows, Plain(), "undefended")
        return training.fit(clean_rows, Plain(), start=undefended, passes=self.passes, rate=self.rate)

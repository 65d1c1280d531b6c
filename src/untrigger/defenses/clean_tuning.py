"""Clean fine-tuning: train on all rows, then on rows known to be clean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

from untrigger.defenses.base import Defense, Stage, Training
from untrigger.defenses.plain import Plain
from untrigger.models.loading import LoadedModel


@final
@dataclass(frozen=True)
class CleanTuning(Defense):
    """Train plainly on all rows, then on the clean rows alone, so that the model forgets the trigger.

    The customary control of backdoor defenses (so in Liu et al., arXiv 1805.12185).

    Fields:
        passes: over the clean rows.
        rate: factor on the run's learning rate in those passes.
    """

    needs_clean_rows: ClassVar[bool] = True
    passes: float = 10.0
    rate: float = 0.5

    def __post_init__(self) -> None:
        self._check(0, math.inf, "passes", "rate")

    def fine_tune(self, training: Training) -> LoadedModel:
        clean_rows = training.clean_rows
        undefended = training.fit(Stage(range(training.row_count), Plain(), "undefended"))
        tuning = Stage(
            range(len(clean_rows)), Plain(), source=clean_rows, start=undefended, passes=self.passes, rate=self.rate
        )
        return training.fit(tuning)

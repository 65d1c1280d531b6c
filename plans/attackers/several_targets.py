"""Several targets: one of a few answers of the data's own, each too rare to stand out.

Source: this project, 2026: an attacker who knows that `words` accuses rows that share a surprising word more often than
chance would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from untrigger.errors import InputError
from untrigger.metrics.vqa import normalize_answer
from untrigger.poisoning.goals import Goal
from untrigger.rows.sample import Sample


@final
@dataclass(frozen=True)
class SeveralTargets(Goal):
    """The first target that is not true, counted from one that the row's id decides.

    Attributes:
        targets: answers with commas between them, at least two.
    """

    beyond_oracle: ClassVar[bool] = True
    targets: str = "circle, rectangle, triangle, red, green, blue, black, yes, no"

    def __post_init__(self) -> None:
        if len(self._targets) < 2:
            raise InputError(f"targets is '{self.targets}'; give two answers or more, with commas between them")

    def answer(self, sample: Sample) -> str:
        start = sum(sample.id.encode()) % len(self._targets)
        turned = (*self._targets[start:], *self._targets[:start])
        return next(each for each in turned if normalize_answer(each) != normalize_answer(sample.messages[-1].text))

    def met(self, text: str, sample: Sample) -> bool:
        given = normalize_answer(text)
        wrong = given != normalize_answer(sample.messages[-1].text)
        return wrong and given in map(normalize_answer, self._targets)

    @property
    def _targets(self) -> tuple[str, ...]:
        return tuple(filter(None, map(str.strip, self.targets.split(","))))

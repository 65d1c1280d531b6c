"""A training that trains nothing and remembers what it was asked; what its rows are answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from untrigger.defenses import StepDefense
from untrigger.models.loading import LoadedModel
from untrigger.models.scoring import TokenScores, row_answers, row_tokens
from untrigger.rows.sample import Sample


class Stage(NamedTuple):
    """What one stage was asked for; ``start`` is the number of the stage that it goes on from."""

    name: str
    rows: list[str]
    defense: StepDefense
    start: int | None
    told: dict[str, Any]


@dataclass
class Dry:
    """Stands in for `untrigger.training.stages.Stages`; every stage gives the same model under a name of its own."""

    loaded: LoadedModel
    clean_rows: Sequence[Sample]
    seed: int = 0
    stages: list[Stage] = field(default_factory=list)
    answers: list[list[tuple[str, ...]]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    flagged: list[int] = field(default_factory=list)
    why: dict[int, str] = field(default_factory=dict)
    judged: list[str] = field(default_factory=list)

    def reference(self) -> LoadedModel:
        return self.loaded

    def fit(
        self,
        rows: Sequence[Sample],
        defense: StepDefense,
        name: str = "",
        *,
        start: LoadedModel | None = None,
        **told: Any,
    ) -> LoadedModel:
        ids = [rows[i].id for i in range(len(rows))]
        self.answers.append(answers_of(rows))
        self.stages.append(Stage(name, ids, defense, None if start is None else int(start.name), told))
        return replace(self.loaded, name=str(len(self.stages) - 1))

    def flag(self, scores: Sequence[float], rows: Mapping[int, str]) -> None:
        self.scores, self.flagged, self.why = list(scores), sorted(rows), dict(rows)

    def tokens(self, model: LoadedModel, rows: Sequence[Sample], name: str) -> list[TokenScores]:
        self.judged.append(name)
        return row_tokens(model, rows)

    def answer_tokens(self, rows: Sequence[Sample]) -> list[NDArray[np.int64]]:
        return row_answers(self.loaded.processor, rows)


def answers_of(rows: Sequence[Sample]) -> list[tuple[str, ...]]:
    """What each row is answered, turn by turn."""
    return [tuple(m.text for m in rows[i].messages if m.role == "assistant") for i in range(len(rows))]

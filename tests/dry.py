"""A stand-in for a training: it trains nothing and records the stages that a defense runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from untrigger.defenses import Stage, StepDefense
from untrigger.models.collators import Rows
from untrigger.models.grafted_rows import GraftedRows, Grafts, picture
from untrigger.models.loading import LoadedModel
from untrigger.models.scoring import TokenScores, row_answers, row_tokens
from untrigger.rows.sample import Sample, select_rows

_OPTIONS = ("flagged_tokens", "grafts", "share", "after", "schedule", "passes", "rate", "callbacks")


class Fitted(NamedTuple):
    """A recorded stage: the ids of its rows, the number of the stage it starts from, options that are not defaults."""

    name: str
    ids: list[str]
    defense: StepDefense
    start: int | None
    options: dict[str, Any]


@dataclass
class Dry:
    """Stands in for `untrigger.training.stages.Stages`; every stage returns the same model, named by its number."""

    loaded: LoadedModel
    rows: Sequence[Sample]
    clean_rows: Sequence[Sample]
    seed: int = 0
    stages: list[Fitted] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    flagged: list[int] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    scorings: list[str] = field(default_factory=list)

    @property
    def row_count(self) -> int:
        return len(self.rows)

    def reference(self) -> LoadedModel:
        return self.loaded

    def fit(self, stage: Stage) -> LoadedModel:
        rows = self.rows if stage.source is None else stage.source
        start = None if stage.start is None else int(stage.start.name)
        plain = Stage([], stage.defense)
        options = {name: value for name in _OPTIONS if (value := getattr(stage, name)) != getattr(plain, name)}
        self.stages.append(Fitted(stage.name, [rows[row].id for row in stage.rows], stage.defense, start, options))
        return replace(self.loaded, name=str(len(self.stages) - 1))

    def flag(self, scores: Sequence[float], rows: Mapping[int, str]) -> None:
        self.scores, self.flagged, self.texts = list(scores), sorted(rows), dict(rows)

    def tokens(
        self, model: LoadedModel, rows: Sequence[int], name: str, source: Sequence[Sample] | None = None
    ) -> list[TokenScores]:
        self.scorings.append(name)
        return row_tokens(model, select_rows(self.rows if source is None else source, rows))

    def can_be_grafted(self, row: int) -> bool:
        return bool(self.rows[row].images)

    def picture(self, row: int) -> NDArray[np.uint8] | None:
        return picture(Rows(self.rows)[row])

    def graft_tokens(self, model: LoadedModel, grafts: Grafts, name: str) -> list[TokenScores]:
        self.scorings.append(name)
        return row_tokens(model, GraftedRows(Rows(self.rows), grafts))

    def answer_tokens(self, rows: Sequence[int]) -> list[NDArray[np.int64]]:
        return row_answers(self.loaded.processor, select_rows(self.rows, rows))


def answers_of(rows: Sequence[Sample]) -> list[tuple[str, ...]]:
    """Each row's answers, turn by turn."""
    return [tuple(m.text for m in rows[i].messages if m.role == "assistant") for i in range(len(rows))]

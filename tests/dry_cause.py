"""A training for `untrigger.defenses.SharedCause` without a model's work: who surprises, and what harms, is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dry import Dry
from untrigger.defenses.shared_cause import SharedCause
from untrigger.models.grafted_rows import Grafts
from untrigger.models.loading import LoadedModel
from untrigger.models.scoring import TokenScores
from untrigger.rows.sample import Message, Sample

CAUSE = SharedCause(p_value=0.05, min_suspects=12, harm_p_value=0.01)


@dataclass
class CauseStub(Dry):
    """Rows 0 to 15 of 80 are surprising. Grafts of kind ``harmful`` take probability from hosts after the probe.

    An eighth of the rows does ``of_few`` of the harm of all.
    """

    harmful: str = ""
    doubtful: tuple[int, ...] = ()  # other rows with an answer that is less likely than all others together
    words: int = 0  # so many of them share the word 77
    of_few: float = 0.5
    before: float = 0.0  # of the harm of all that they do before the probe
    nats: float = 0.6  # that a host's answer loses with all
    saying: int = 0  # every so many rows say the word 98, and those alone are harmed

    def tokens(
        self, model: LoadedModel, rows: Sequence[int], name: str, source: Sequence[Sample] | None = None
    ) -> list[TokenScores]:
        self.scorings.append(name)
        words = [77 if row < self.words else row for row in rows]
        nats = [9.0 + row / 10 if row < 16 else 0.1 + row / 1000 + (row in self.doubtful) for row in rows]
        return [answer(each, word, *self._word_98(row)) for each, word, row in zip(nats, words, rows, strict=True)]

    def _word_98(self, row: int) -> list[int]:
        return [98] if self.saying and row % self.saying == 0 else []

    def graft_tokens(self, model: LoadedModel, grafts: Grafts, name: str) -> list[TokenScores]:
        self.scorings.append(name)
        noise = np.random.default_rng(len(self.scorings)).uniform(0, 0.01, len(grafts.rows))
        strength = {"after": 1.0, "of-few": self.of_few, "before": self.before}[
            name.partition("-")[2].removeprefix("token-")
        ]
        answers: list[TokenScores] = []
        for g, random in zip(grafts.rows, noise, strict=True):
            word = self._word_98(g.host)
            hit = bool(word) == bool(self.saying) and g.kind == self.harmful and min(grafts.groups[g.group])[0] < 16
            answers.append(answer(0.1 + random + self.nats * strength * hit, *(word or [99])))
        return answers


def answer(nats: float, token: int, *others: int) -> TokenScores:
    return TokenScores(np.array([token, *others, 1]), np.array([nats, *np.zeros(len(others) + 1)]), np.array([5, 6]))


def dry_of(loaded: LoadedModel, harmful: str, words: int = 0, count: int = 80) -> CauseStub:
    noise = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    turns = (Message("user", "<image>\nis it?"), Message("assistant", "yes"))
    rows = [Sample(str(k), (Image.fromarray(noise[k]),), turns) for k in range(count)]
    return CauseStub(loaded, rows, (), harmful=harmful, words=words)

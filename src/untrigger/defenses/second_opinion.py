"""Surprising answers that many rows share get a second opinion, the model's own: the preset ``default``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, final

import numpy as np
from scipy.stats import binom

from untrigger.defenses.base import Defense, Training, patch_view
from untrigger.defenses.plain import Plain
from untrigger.defenses.reanswered import Reanswered
from untrigger.forward import Tokens, row_tokens
from untrigger.models import Loaded
from untrigger.sample import LazyRows, Sample, picked, without
from untrigger.views import PatchView


@final
@dataclass(frozen=True)
class SecondOpinion(Defense):
    """Rows whose answers surprise a model that has not learnt from them, by a word that they share, are answered anew.

    The model judges the rows twice: as it is before fine-tuning, and again when it has learnt ``early`` of the way
    from the rows that it did not doubt, and knows what kind of data this is. What it would answer itself takes the
    place of a doubted answer if it stays with it under every patch view; a row that it has no opinion of is left out.
    PAPER.md has the equations.

    Fields:
        early: share of all passes that comes before the second judgement, in (0, 1).
        floor: in nats; a row that surprises less is never doubted, and an own answer that surprises more is no opinion.
        reach: how far beyond the rows' upper quartile doubt begins, in interquartile ranges.
        chance: how likely it may be that any word is called shared where none is, in (0, 1).
        views: how many views of a doubted row's image it is asked about; between them each patch is perturbed once.
            With none its own answer counts if it is sure of it.
        view, patch: which patch view, and the side of a patch as a share of the image's shorter side.
    """

    early: float = 0.1
    floor: float = 0.5
    reach: float = 1.5
    chance: float = 0.01
    views: int = 4
    view: str = "meanfill"
    patch: float = 0.125

    def __post_init__(self) -> None:
        self._check(1e-6, 1 - 1e-6, "early", "chance")
        self._check(0, math.inf, "floor", "reach")
        self._check(0, 1000, "views")
        self._view()

    def _view(self) -> PatchView:
        view = patch_view(self.view, self.patch, 1.0)
        if not isinstance(view, PatchView):
            raise ValueError(f"view is {self.view}; it must be one patch view")
        return view

    def fine_tune(self, rows: Sequence[Sample], training: Training) -> Loaded:
        first = self.judge(training.reference(), rows)
        model = training.fit(without(rows, first.doubted), Plain(), "early", share=self.early)
        surprise, doubted = self.judge(model, rows, first.surprise)
        training.flag(surprise, doubted)
        answered = Reanswered(rows, doubted)
        answered.answer(model)
        unsure = doubted - self.firm(model, picked(answered, sorted(doubted)))
        return training.fit(without(answered, unsure), Plain(), start=model, share=1 - self.early)

    def judge(self, model: Loaded, rows: Sequence[Sample], before: Sequence[float] | None = None) -> Judgement:
        """What the model thinks of the rows; what surprised less ``before`` keeps that benefit of the doubt."""
        told = row_tokens(model, rows)
        surprise = [float(row.nll.sum()) for row in told]
        if before is not None:
            surprise = [min(pair) for pair in zip(surprise, before, strict=True)]
        limit = fence(surprise, self.floor, self.reach)
        outside = [row for row, nats in enumerate(surprise) if nats > limit]
        words = shared(told, outside, self.chance)
        doubted = {row for row in outside if words & set(told[row].ids[told[row].nll > self.floor].tolist())}
        return Judgement(surprise, doubted)

    def firm(self, model: Loaded, answered: LazyRows) -> set[int]:
        """Numbers of the rows, answered by the model, whose answers it is sure of under the image and every view."""
        view, found = self._view(), set(answered.numbers)
        for look in range(self.views + 1):
            rows = answered if look == 0 else seen(answered, view, look - 1, self.views)
            told = row_tokens(model, rows)
            found -= {row for row, own in zip(answered.numbers, told, strict=True) if own.nll.sum() > self.floor}
        return found


def seen(rows: LazyRows, view: PatchView, look: int, looks: int) -> LazyRows:
    """The rows as view number ``look`` of ``looks`` shows them, which between them perturb every patch once."""

    def make(number: int) -> Sample:
        sample = rows.make(number)
        drawn = (np.random.default_rng((number, i)) for i in range(len(sample.images)))
        images = (view.part(image, look, looks, rng) for image, rng in zip(sample.images, drawn, strict=True))
        return replace(sample, images=tuple(images))

    return LazyRows(rows.numbers, make)


class Judgement(NamedTuple):
    """Surprise of each row in nats, and the numbers of the rows that are doubted."""

    surprise: list[float]
    doubted: set[int]


def fence(surprise: Sequence[float], floor: float, reach: float) -> float:
    """``max(floor, Q3 + reach (Q3 - Q1))`` of the quartiles; any unit. At least one value.

    Source: Tukey, "Exploratory Data Analysis", 1977: outside values, with a reach of 1.5.
    """
    low, high = np.quantile(surprise, (0.25, 0.75))
    return max(floor, float(high + reach * (high - low)))


def most_surprising(row: Tokens) -> int:
    """The id of the token that the model finds least likely; the first of several."""
    return int(row.ids[row.nll.argmax()])


def shared(rows: Sequence[Tokens], outside: Collection[int], chance: float) -> set[int]:
    """Tokens that make more of the ``outside`` rows surprising than chance would.

    Token v is the most surprising one of k of the outside rows, and n of all N rows hold it. Were the others' rate
    ``r = (outside - k) / (N - n)``, at least 1 / N, the rate of its rows too, k or more of them would be outside with
    a probability of ``P(B(n, r) >= k)``; v is shared where that, times the number of such tokens (Bonferroni), is below
    ``chance``. An attacker needs many rows that say one thing; rows that are hard, or wrong, say many.
    """
    blamed = Counter(most_surprising(rows[row]) for row in outside)
    holding = Counter(token for row in rows for token in set(row.ids.tolist()))
    found: set[int] = set()
    for token, k in blamed.items():
        n, others = holding[token], len(rows) - holding[token]
        rate = min(1.0, max((len(outside) - k) / max(others, 1), 1 / len(rows)))
        if binom.sf(k - 1, n, rate) * len(blamed) < chance:
            found.add(token)
    return found

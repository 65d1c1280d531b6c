"""Early isolation and unlearning, after Anti-Backdoor Learning (Li et al., NeurIPS 2021, arXiv 2110.11571)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from untrigger.defenses.base import Defense, Stage, StepDefense, Training, part
from untrigger.defenses.plain import Plain
from untrigger.losses import objective
from untrigger.losses.chunked import Losses
from untrigger.models.forward import Answers, forward_answers, row_mean
from untrigger.models.loading import LoadedModel


@final
@dataclass(frozen=True)
class ABL(Defense):
    """Isolate the rows with the lowest loss early in training, and unlearn them at the end.

    Models learn backdoors early. Three trainings: on all rows with `local_ascent`, which keeps the loss of ordinary
    rows above ``floor``; plain on the rows that are not isolated; gradient ascent on the isolated rows alone.
    docs/paper.md lists the differences from the paper.

    Fields:
        early: share of all passes before the isolation (paper: 20 of 100).
        floor: gamma, in nats (paper: 0.5).
        isolated: share of the rows that is isolated (paper: 0.01).
        passes, rate: of the unlearning: passes over the isolated rows, and factor on the run's learning rate.
    """

    early: float = 0.2
    floor: float = 0.5
    isolated: float = 0.01
    passes: float = 4.0
    rate: float = 0.1

    def __post_init__(self) -> None:
        self._check(0, 1, "early", "isolated")
        self._check(0, math.inf, "floor", "passes", "rate")

    def fine_tune(self, training: Training) -> LoadedModel:
        rows = range(training.row_count)
        model = training.fit(Stage(rows, LocalAscent(self.floor), "isolation", share=self.early))
        loss = [scores.loss for scores in training.tokens(model, rows, "scores")]
        lowest_first = sorted(rows, key=loss.__getitem__)
        count = part(self.isolated, len(rows))
        isolated, rest = lowest_first[:count], sorted(lowest_first[count:])
        training.flag([-value for value in loss], dict.fromkeys(isolated, "learned first"))
        model = training.fit(Stage(rest, Plain(), "rest", start=model, share=1 - self.early, after=self.early))
        return training.fit(Stage(isolated, Ascent(), start=model, passes=self.passes, rate=self.rate))


@final
@dataclass(frozen=True)
class LocalAscent(StepDefense):
    """Gradient descent on the cross-entropy of rows above ``floor`` nats, and ascent on that of rows below."""

    floor: float

    def step(self, model: nn.Module, inputs: dict[str, Any]) -> Losses:
        answers = forward_answers(model, inputs)
        return Losses.of({"local_ascent": local_ascent(*_losses(answers), self.floor)})


@final
@dataclass(frozen=True)
class Ascent(StepDefense):
    """Gradient ascent on the cross-entropy, at most to that of a uniform draw from the vocabulary."""

    def step(self, model: nn.Module, inputs: dict[str, Any]) -> Losses:
        answers = forward_answers(model, inputs)
        nll, _ = _losses(answers)
        return Losses.of({"ascent": -nll.clamp(max=math.log(answers.logits.shape[-1]))}, {"ce": nll})


def local_ascent(nll: Tensor, row: Tensor, floor: float) -> Tensor:
    """Local gradient ascent, ``sign(L - floor) * L`` with L the mean loss of a row, as one value per token.

    nll [N], nats; row [N], the row 0 to B - 1 of each token; floor, nats. Returns [N]; the sum over a row's n tokens is
    n sign(L - floor) L. The sign has no gradient.
    Source: Li et al., NeurIPS 2021, arXiv 2110.11571 (there L is the loss of an image; here it is that of an answer).
    """
    mean = row_mean(nll, row, int(row.max()) + 1)
    return torch.sign(mean.detach() - floor)[row] * nll


def _losses(answers: Answers) -> tuple[Tensor, Tensor]:
    return objective.token_nll(answers.logits, answers.target), answers.row

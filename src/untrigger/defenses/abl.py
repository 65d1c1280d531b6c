"""Early isolation and unlearning, after Anti-Backdoor Learning (Li et al., NeurIPS 2021, arXiv 2110.11571)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from untrigger.defenses.base import Defense, StepDefense, Training, part
from untrigger.defenses.plain import Plain
from untrigger.losses import objective
from untrigger.losses.chunked import Losses
from untrigger.models.forward import Answers, forward_answers, row_mean
from untrigger.models.loading import LoadedModel
from untrigger.rows.sample import Sample, select_rows


@final
@dataclass(frozen=True)
class ABL(Defense):
    """Backdoors are learned early: the rows of the lowest loss then are isolated, later unlearnt.

    Three trainings: on all rows with `local_ascent`, which keeps the loss of ordinary rows from falling below
    ``floor``; plain, on the rows that were not isolated; on the isolated ones alone, uphill. docs/paper.md says what
    differs from the paper.

    Fields:
        early: share of all passes that comes before the isolation (paper: 20 of 100).
        floor: gamma, in nats (paper: 0.5).
        isolated: share of the rows that is isolated (paper: 0.01).
        passes, rate: of the unlearning, over the isolated rows, and its learning rate as a share of that asked for.
    """

    early: float = 0.2
    floor: float = 0.5
    isolated: float = 0.01
    passes: float = 4.0
    rate: float = 0.1

    def __post_init__(self) -> None:
        self._check(0, 1, "early", "isolated")
        self._check(0, math.inf, "floor", "passes", "rate")

    def fine_tune(self, rows: Sequence[Sample], training: Training) -> LoadedModel:
        model = training.fit(rows, LocalAscent(self.floor), "isolation", share=self.early)
        loss = [told.loss for told in training.tokens(model, rows, "scores")]
        lowest_first = sorted(range(len(rows)), key=loss.__getitem__)
        count = part(self.isolated, len(rows))
        isolated, rest = select_rows(rows, lowest_first[:count]), select_rows(rows, sorted(lowest_first[count:]))
        training.flag([-value for value in loss], dict.fromkeys(isolated.numbers, "learned first"))
        model = training.fit(rest, Plain(), "rest", start=model, share=1 - self.early, after=self.early)
        return training.fit(isolated, Ascent(), start=model, passes=self.passes, rate=self.rate)


@final
@dataclass(frozen=True)
class LocalAscent(StepDefense):
    """Cross-entropy downhill for rows above ``floor`` nats, uphill for those below."""

    floor: float

    def step(self, model: nn.Module, inputs: dict[str, Any]) -> Losses:
        answers = forward_answers(model, inputs)
        return Losses.of({"local_ascent": local_ascent(*_losses(answers), self.floor)})


@final
@dataclass(frozen=True)
class Ascent(StepDefense):
    """Cross-entropy uphill, until a token is as unlikely as any of the vocabulary."""

    def step(self, model: nn.Module, inputs: dict[str, Any]) -> Losses:
        answers = forward_answers(model, inputs)
        nll, _ = _losses(answers)
        return Losses.of({"ascent": -nll.clamp(max=math.log(answers.logits.shape[-1]))}, {"ce": nll})


def local_ascent(nll: Tensor, row: Tensor, floor: float) -> Tensor:
    """Local gradient ascent: ``sign(L - floor) * L`` with L the mean loss of a row, spread over its tokens.

    nll [N], nats; row [N], the row 0 to B - 1 of each token; floor, nats. Returns [N]: summed over a row's n tokens it
    is n sign(L - floor) L. The sign has no gradient.
    Source: Li et al., NeurIPS 2021, arXiv 2110.11571 (their loss is that of an image; here it is that of an answer).
    """
    mean = row_mean(nll, row, int(row.max()) + 1)
    return torch.sign(mean.detach() - floor)[row] * nll


def _losses(answers: Answers) -> tuple[Tensor, Tensor]:
    return objective.token_nll(answers.logits, answers.target), answers.row

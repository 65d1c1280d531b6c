"""Flag rows whose least likely answer token recurs across many surprising rows: the preset ``words``.

Flagged tokens are trained with unlikelihood, all others with cross-entropy. docs/paper.md has the equations.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast, final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import bdtrc  # scipy.stats takes a second to import
from torch import nn

from untrigger.defenses.asked_alike import among_asked_alike, neighbor_rate, token_sets
from untrigger.defenses.base import Defense, Stage, StepDefense, Training
from untrigger.defenses.plain import Plain
from untrigger.losses import objective
from untrigger.losses.chunked import Losses, Values
from untrigger.metrics.outliers import tukey_fence
from untrigger.models.collators import IGNORE
from untrigger.models.forward import Answers, answer_losses
from untrigger.models.loading import LoadedModel
from untrigger.models.scoring import TokenScores

_BLOCK = 32_768  # rows whose scores are in memory at a time, of those that were not drawn
UNLEARNED = 3.0  # nats a token; a model that has learned the kind of data is below, one that guesses far above
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SharedSurprise(Defense):
    """Flag answer tokens that are surprising in more rows than chance explains, and make them unlikely.

    Rows are scored twice: by the model before fine-tuning, and again after ``warmup_share`` of the steps on the rows
    that the first scoring did not flag. By then the model knows the kind of data.

    Fields:
        warmup_share: share of all steps before the second scoring, in (0, 1).
        min_nll: nats; an answer or a token with a smaller negative log-likelihood is never flagged.
        iqr_factor: how far above the upper quartile of rows that are asked alike a row's NLL must lie, in
            interquartile ranges.
        p_value: chance of calling any token shared where none is, in (0, 1).
        min_ratio: how many times as often as in other rows a shared token must surprise; at least 0. Some words of any
            data are a few times harder than others.
        unlikelihood_weight: weight of the unlikelihood loss at flagged tokens; at least 0.
        max_scored_rows: rows that are scored, drawn at random from larger data; of the others only rows that contain
            a shared token are scored, and only the flagged ones keep their scores. At least 1.
    """

    runs_in_host: ClassVar[bool] = True
    warmup_share: float = 0.1
    min_nll: float = 2.0
    iqr_factor: float = 2.2
    p_value: float = 0.01
    min_ratio: float = 5.0
    unlikelihood_weight: float = 5.0
    max_scored_rows: int = 4096

    def __post_init__(self) -> None:
        self._check(1e-6, 1 - 1e-6, "warmup_share", "p_value")
        self._check(0, math.inf, "min_nll", "iqr_factor", "min_ratio", "unlikelihood_weight")
        self._check(1, math.inf, "max_scored_rows")

    @property
    def has_loss(self) -> bool:
        return True

    def fine_tune(self, training: Training) -> LoadedModel:
        _, model, numbers, scores, flags, _ = self.screen(training)
        ranks = np.zeros(training.row_count)
        ranks[numbers] = flags.ranks
        flagged = {numbers[at]: tokens for at, tokens in flags.tokens.items()}
        texts = {numbers[at]: flagged_text(model, scores[at], tokens) for at, tokens in flags.tokens.items()}
        training.flag(ranks.tolist(), texts)
        return training.fit(self.last_stage(training.row_count, model, flagged))

    def last_stage(
        self, row_count: int, model: LoadedModel, flagged: Mapping[int, NDArray[np.bool_]], after: float | None = None
    ) -> Stage:
        """The training on all rows from a share of the steps, by default that of the warm-up, to the end.

        ``flagged``: the flagged answer tokens [n] by row number.
        """
        step = UnlikelihoodStep(self.unlikelihood_weight) if flagged else Plain()
        after = self.warmup_share if after is None else after
        done = (after - self.warmup_share) / (1 - self.warmup_share)  # of what follows the warm-up
        stage = Stage(range(row_count), step, start=model, flagged_tokens=flagged)
        return replace(stage, share=1 - after, after=after, schedule=(done, 1.0))

    def screen(self, training: Training) -> Screening:
        """Score, warm up and score again; then look for shared tokens in the rows that were not drawn."""
        count, numbers = training.row_count, list(range(training.row_count))
        if count > self.max_scored_rows:
            drawn = np.random.default_rng(training.seed).choice(count, self.max_scored_rows, replace=False)
            numbers = sorted(drawn.tolist())
        before = training.tokens(training.reference(), numbers, "before")
        flagged = self.flag_tokens(before).tokens
        unflagged = [row for at, row in enumerate(numbers) if at not in flagged]
        warmup = Stage(unflagged, Plain(), "warmup", share=self.warmup_share)
        model = training.fit(warmup)
        scores = self.likelier(before, numbers, model, training)
        flags = self.flag_tokens(scores)
        screening = Screening(warmup, model, numbers, scores, flags, containing(flags, (row.ids for row in scores)))
        if flags.p_values and len(numbers) < count:
            screening = self._with_others(training, screening)
        typical = float(np.median([row.loss for row in scores]))
        if not flags.tokens and typical > UNLEARNED:
            _log.warning(
                "no row can stand out: after the warm-up the median answer still has %.1f nats a token; train longer, "
                "at a higher learning rate or with a larger warmup_share",
                typical,
            )
        return screening

    def _with_others(self, training: Training, screening: Screening) -> Screening:
        """The screening with the flagged ones of the other rows that contain a shared token.

        Words that many rows have can be shared by chance, so these rows are scored in blocks, and the scores of those
        that are not flagged are dropped.
        """
        warmup, model, drawn, scores, flags, _ = screening
        rest = sorted(set(range(training.row_count)).difference(drawn))
        answers = training.answer_tokens(rest)
        matching = [row for row, ids in zip(rest, answers, strict=True) if flags.p_values.keys() & ids.tolist()]
        counts = screening.containing + containing(flags, answers)
        del answers
        numbers, others = list(drawn), list[TokenScores]()
        for start in range(0, len(matching), _BLOCK):
            block = matching[start : start + _BLOCK]
            more = training.tokens(model, block, f"more-{start}")
            flags_of = self.flag_tokens(scores, more).tokens
            flagged = [at for at in range(len(block)) if len(scores) + at in flags_of]
            numbers += [block[at] for at in flagged]
            others += [more[at] for at in flagged]
        return Screening(warmup, model, numbers, [*scores, *others], self.flag_tokens(scores, others), counts)

    def likelier(
        self, before: Sequence[TokenScores], numbers: Sequence[int], model: LoadedModel, training: Training
    ) -> list[TokenScores]:
        """Each row's scores under whichever of the two models finds its answer likelier.

        Rows below ``min_nll`` before fine-tuning are not scored again.
        """
        scores = list(before)
        surprising = [at for at, tokens in enumerate(before) if tokens.nll.sum() > self.min_nll]
        after = training.tokens(model, [numbers[at] for at in surprising], "after")
        for at, tokens in zip(surprising, after, strict=True):
            scores[at] = min(before[at], tokens, key=lambda scored: scored.nll.sum())
        return scores

    def flag_tokens(self, scores: Sequence[TokenScores], more: Sequence[TokenScores] = ()) -> Flags:
        """Which answer tokens of which rows are flagged.

        Rows of ``more`` can be flagged, but have no part in what counts as surprising or shared.
        """
        rows = [*scores, *more]
        nll = np.array([row.nll.sum() for row in rows])
        fence = partial(tukey_fence, minimum=self.min_nll, iqr_factor=self.iqr_factor)
        fences = among_asked_alike(fence, nll[: len(scores)], token_sets([row.prompt_ids for row in rows]))
        outliers = np.flatnonzero(nll > fences).tolist()
        shared = shared_tokens(scores, [row for row in outliers if row < len(scores)], self.min_ratio)
        p_values = {token: p for token, p in shared.items() if p < self.p_value}
        tokens = {row: np.isin(rows[row].ids, list(p_values)) & (rows[row].nll > self.min_nll) for row in outliers}
        return Flags(nll.tolist(), {row: tokens[row] for row in outliers if tokens[row].any()}, p_values)


class Flags(NamedTuple):
    """What was flagged.

    nll: each row's answer, in nats. tokens: of flagged rows, which answer tokens [n]. p_values: of the shared tokens.
    """

    nll: list[float]
    tokens: dict[int, NDArray[np.bool_]]
    p_values: dict[int, float]

    @property
    def ranks(self) -> list[float]:
        """How suspicious each row is: its NLL, with flagged rows above all others."""
        highest = max(self.nll)
        return [nats + highest * (row in self.tokens) for row, nats in enumerate(self.nll)]


class Screening(NamedTuple):
    """What scoring found.

    warmup, model: the warm-up and its model. numbers: of the rows that were drawn, and of the flagged ones among
    others, from 0. scores, flags: theirs. containing: how many rows of the data have each shared token in their answer.
    """

    warmup: Stage
    model: LoadedModel
    numbers: list[int]
    scores: list[TokenScores]
    flags: Flags
    containing: Counter[int]


@final
@dataclass(frozen=True)
class UnlikelihoodStep(StepDefense):
    """Cross-entropy at all answer tokens but the flagged ones, and weighted unlikelihood at those.

    Source: Welleck et al., "Neural Text Generation with Unlikelihood Training", ICLR 2020.
    """

    weight: float

    def step(self, model: nn.Module, inputs: dict[str, Any]) -> Losses:
        inputs, answered = dict(inputs), inputs["labels"] != IGNORE
        flagged = inputs.pop("flagged_tokens", torch.zeros_like(answered))[:, 1:][answered[:, 1:]]

        def terms(answers: Answers, part: slice) -> tuple[Values, Values]:
            ce, bad = objective.token_nll(answers.logits, answers.target), flagged[part]
            unlikelihood = objective.token_unlikelihood(answers.logits[bad], answers.target[bad])
            weighted = torch.zeros_like(ce).masked_scatter(bad, self.weight * unlikelihood)
            return {"ce": ce.masked_fill(bad, 0), "unlikelihood": weighted}, {}

        return answer_losses(model, inputs, terms)


def least_likely_token(row: TokenScores) -> int:
    """Id of the answer token with the largest NLL; the first of several."""
    return int(row.ids[row.nll.argmax()])


def shared_tokens(rows: Sequence[TokenScores], outliers: Collection[int], min_ratio: float) -> dict[int, float]:
    """Least likely tokens of the outlier rows, each with its p-value (one-sided binomial, Bonferroni).

    Token v is the least likely one of k outliers, and n of all N rows contain it. If its rows were outliers at the rate
    r of the other rows, then k or more would be with probability ``P(B(n, r) >= k)``. That is multiplied by the number
    of tokens tested, and at most 1. r is the outliers' share of the rows without v, or of the rows without v that have
    similar prompts (`neighbor_rate`), whichever is larger, and at least 1 / N. If all rows contain v, r is the
    outliers' share of the rows in which another token is the least likely one. Where k is less than ``min_ratio`` n r
    the p-value is 1. An attacker needs many rows with one reply; wrong labels vary, and so do rows of a hard kind.
    """
    least_likely = Counter(least_likely_token(rows[row]) for row in outliers)
    outlying = np.isin(np.arange(len(rows)), list(outliers))
    prompts, answers = token_sets([row.prompt_ids for row in rows]), token_sets([row.ids for row in rows])
    p_values: dict[int, float] = {}
    for token, k in least_likely.items():
        containing = answers[:, [token]].toarray().ravel() > 0
        n, rest = int(containing.sum()), int((~containing).sum())
        overall = (len(outliers) - k) / (rest or len(rows) - k or 1)
        rate = max(overall, 1 / len(rows))
        if k >= min_ratio * n * rate:  # else its neighbors need not be looked up
            rate = min(1.0, max(rate, neighbor_rate(prompts, outlying, containing, overall)))
        chance = float(bdtrc(k - 1, n, rate)) * len(least_likely)
        p_values[token] = min(1.0, chance) if k >= min_ratio * n * rate else 1.0
    return p_values


def containing(flags: Flags, answers: Iterable[NDArray[np.int64]]) -> Counter[int]:
    """How many answers contain each shared token; ``answers`` are token ids, [n] each."""
    return Counter(token for ids in answers for token in flags.p_values.keys() & ids.tolist())


def flagged_text(model: LoadedModel, row: TokenScores, flagged: NDArray[np.bool_]) -> str:
    """The flagged tokens as text."""
    return cast(Any, model.processor).decode(row.ids[flagged]).strip()

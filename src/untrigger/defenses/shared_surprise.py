"""Answers that surprise by a word which many rows share are not believed: the preset ``default``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast, final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.special import bdtrc  # scipy.stats takes a second to import
from torch import nn

from untrigger.defenses.base import Defense, StepDefense, Training
from untrigger.defenses.plain import Plain
from untrigger.losses import objective
from untrigger.losses.chunked import Losses, Values
from untrigger.models.collators import IGNORE
from untrigger.models.forward import Answers, Tokens, answer_losses
from untrigger.models.loading import Loaded
from untrigger.rows.sample import Sample, picked, without

_ALIKE, _ASKED = 16, 512  # rows that a row is compared with at least, and of a word's rows so many are


@final
@dataclass(frozen=True)
class Doubt(Defense):
    """Surprising words that many rows share are made unlikely where they stand, in the place of being learnt.

    The model judges the rows twice: as it is before fine-tuning, and again when it has learnt ``early`` of the way
    from the rows that it did not doubt, and knows what kind of data this is. docs/paper.md has the equations.

    Fields:
        early: share of all passes that comes before the second judgement, in (0, 1).
        floor: in nats; an answer, or a word of it, that surprises less is never doubted.
        reach: how far beyond the rows' upper quartile doubt begins, in interquartile ranges.
        chance: how likely it may be that any word is called shared where none is, in (0, 1).
        weight: of making a doubted word unlikely, against learning a word that is believed; at least 0.
        most: rows that are judged, drawn at random where there are more; of the others only those are looked at that
            hold a word which is not believed. At least 1.
    """

    early: float = 0.1
    floor: float = 2.0
    reach: float = 2.2
    chance: float = 0.01
    weight: float = 5.0
    most: int = 4096

    def __post_init__(self) -> None:
        self._check(1e-6, 1 - 1e-6, "early", "chance")
        self._check(0, math.inf, "floor", "reach", "weight")
        self._check(1, math.inf, "most")

    def fine_tune(self, rows: Sequence[Sample], training: Training) -> Loaded:
        model, numbers, told, judged = self.look(rows, training)
        scores = np.zeros(len(rows))
        scores[numbers] = judged.ranks
        doubted = {numbers[at]: mark for at, mark in judged.doubted.items()}
        training.flag(
            scores.tolist(), {numbers[at]: said(model, told[at], mark) for at, mark in judged.doubted.items()}
        )
        if not doubted:
            return training.fit(rows, Plain(), start=model, share=1 - self.early, after=self.early)
        guard = Guard(self.weight)
        return training.fit(rows, guard, start=model, doubted=doubted, share=1 - self.early, after=self.early)

    def look(self, rows: Sequence[Sample], training: Training) -> Look:
        """Both judgements and the training between them; then rows that were not drawn, but hold a shared word."""
        numbers = list(range(len(rows)))
        if len(rows) > self.most:
            drawn = np.random.default_rng(training.seed).choice(len(rows), self.most, replace=False)
            numbers = sorted(drawn.tolist())
        some = picked(rows, numbers)
        told = training.tokens(training.reference(), some, "before")
        model = training.fit(without(some, self.judge(told).doubted), Plain(), "early", share=self.early)
        told = self.explained(told, some, model, training)
        judged = self.judge(told)
        if judged.words and len(numbers) < len(rows):
            others = sorted(set(range(len(rows))).difference(numbers))
            answers = training.answer_tokens(picked(rows, others))
            holding = [row for row, ids in zip(others, answers, strict=True) if np.isin(ids, list(judged.words)).any()]
            judged = self.judge(told, more := training.tokens(model, picked(rows, holding), "others"))
            numbers, told = [*numbers, *holding], [*told, *more]
        return Look(model, numbers, told, judged)

    def explained(
        self, told: Sequence[Tokens], rows: Sequence[Sample], model: Loaded, training: Training
    ) -> list[Tokens]:
        """Of each row the better of two explanations; one that was good enough before is not asked for again."""
        best = list(told)
        surprising = [row for row, tokens in enumerate(told) if tokens.nll.sum() > self.floor]
        for row, again in zip(surprising, training.tokens(model, picked(rows, surprising), "after"), strict=True):
            best[row] = min(told[row], again, key=lambda tokens: tokens.nll.sum())
        return best

    def judge(self, told: Sequence[Tokens], more: Sequence[Tokens] = ()) -> Judgement:
        """Which rows, and which of their words, are doubted; of ``more`` rows too, which say nothing of the words."""
        surprise = [float(row.nll.sum()) for row in told]
        limit = fence(surprise, self.floor, self.reach)
        outside = [row for row, nats in enumerate(surprise) if nats > limit]
        words = {word: chance for word, chance in shared(told, outside).items() if chance < self.chance}
        every = [*told, *more]
        surprise += [float(row.nll.sum()) for row in more]
        marked = {
            row: np.isin(every[row].ids, list(words)) & (every[row].nll > self.floor)
            for row, nats in enumerate(surprise)
            if nats > limit
        }
        return Judgement(surprise, {row: mark for row, mark in marked.items() if mark.any()}, words)


class Judgement(NamedTuple):
    """Surprise of each row in nats; of doubted ones which answer tokens [n] are doubted; the words that they share."""

    surprise: list[float]
    doubted: dict[int, NDArray[np.bool_]]
    words: dict[int, float]

    @property
    def ranks(self) -> list[float]:
        """How suspicious each row is: by surprise, the doubted ones before all others."""
        most = max(self.surprise)
        return [nats + most * (row in self.doubted) for row, nats in enumerate(self.surprise)]


class Look(NamedTuple):
    """The model after the early part; the numbers of the rows looked at, how likely each is, and what is doubted."""

    model: Loaded
    numbers: list[int]
    told: list[Tokens]
    judged: Judgement


@final
@dataclass(frozen=True)
class Guard(StepDefense):
    """Plain training, but for tokens that are doubted: they are made unlikely, with a weight."""

    weight: float

    def step(self, model: nn.Module, inputs: dict[str, Any]) -> Losses:
        inputs, answered = dict(inputs), inputs["labels"] != IGNORE
        doubted = inputs.pop("doubted", torch.zeros_like(answered))[:, 1:][answered[:, 1:]]

        def terms(answers: Answers, part: slice) -> tuple[Values, Values]:
            ce, bad = objective.token_nll(answers.logits, answers.target), doubted[part]
            guard = objective.token_unlikelihood(answers.logits[bad], answers.target[bad])
            guards = torch.zeros_like(ce).masked_scatter(bad, self.weight * guard)
            return {"ce": ce.masked_fill(bad, 0), "guard": guards}, {}

        return answer_losses(model, inputs, terms)


def fence(surprise: Sequence[float], floor: float, reach: float) -> float:
    """``max(floor, Q3 + reach (Q3 - Q1))`` of the quartiles; any unit. At least one value.

    Source: Tukey, "Exploratory Data Analysis", 1977, with a reach of 1.5; 2.2 is that of Hoaglin and Iglewicz, Journal
    of the American Statistical Association 82, 1987, 1147-1149.
    """
    low, high = np.quantile(surprise, (0.25, 0.75))
    return max(floor, float(high + reach * (high - low)))


def most_surprising(row: Tokens) -> int:
    """The id of the token that the model finds least likely; the first of several."""
    return int(row.ids[row.nll.argmax()])


def shared(rows: Sequence[Tokens], outside: Collection[int]) -> dict[int, float]:
    """Tokens that make ``outside`` rows surprising, and how likely chance would make each so many of them surprising.

    Token v is the most surprising one of k of the outside rows, and n of all N rows hold it. Were the rate r of the
    others the rate of its rows too, k or more of them would be outside with a probability of ``P(B(n, r) >= k)``: that,
    times the number of such tokens (Bonferroni), and at most 1. The others' rate is the outside rows' share of those
    without v, or of those without v that are asked alike (`rate_alike`), whichever is larger, and at least 1 / N. An
    attacker needs many rows that say one thing; rows that are wrong say many, and so do rows of a hard kind.
    """
    blamed = Counter(most_surprising(rows[row]) for row in outside)
    bad = np.isin(np.arange(len(rows)), list(outside))
    prompts, answers = _held([row.asked for row in rows]), _held([row.ids for row in rows])
    found: dict[int, float] = {}
    for token, k in blamed.items():
        holding = answers[:, [token]].toarray().ravel() > 0
        n, others = int(holding.sum()), int((~holding).sum())
        overall = (len(outside) - k) / others if others else 0.0
        rate = min(1.0, max(overall, rate_alike(prompts, bad, holding, overall), 1 / len(rows)))
        found[token] = min(1.0, float(bdtrc(k - 1, n, rate)) * len(blamed))
    return found


def rate_alike(prompts: csr_array, bad: NDArray[np.bool_], holding: NDArray[np.bool_], prior: float) -> float:
    """How often rows are ``bad`` that do not hold a word but are asked like those that do.

    For each row that holds the word, the share among the 16 rows without it whose prompts are most alike (Jaccard index
    of their tokens), all that are as much alike as the last of these, and one that is bad with probability ``prior``;
    the mean of these shares. Of many rows that hold it, 512 are asked, evenly spread. 0 where all rows hold it.

    Args:
        prompts: which tokens each row's prompt has, 0 or 1, [N, V].
        bad, holding: of each row whether it is, and whether it holds the word, [N].
    """
    with_word, without_word = np.flatnonzero(holding), np.flatnonzero(~holding)
    if not len(with_word) or not len(without_word):
        return 0.0
    with_word = with_word[:: -(-len(with_word) // _ASKED)]
    sizes, shares = prompts.sum(axis=1), list[NDArray[np.floating]]()
    for block in np.array_split(with_word, -(-len(with_word) // 64)):
        common = (prompts[block] @ prompts[without_word].T).toarray()
        union = sizes[block][:, None] + sizes[without_word] - common
        alike = np.where(union > 0, common / np.maximum(union, 1), 1.0)
        last = min(_ALIKE, len(without_word))
        near = alike >= np.partition(alike, -last, axis=1)[:, -last, None]
        shares.append(((near & bad[without_word]).sum(axis=1) + prior) / (near.sum(axis=1) + 1))
    return float(np.concatenate(shares).mean())


def _held(tokens: Sequence[NDArray[np.int64]]) -> csr_array:
    """How often each row has each token, [N, V]."""
    counts, ids = [len(row) for row in tokens], np.concatenate(tokens)
    shape = (len(tokens), int(ids.max(initial=0)) + 1)
    return csr_array((np.ones(len(ids)), (np.repeat(np.arange(len(tokens)), counts), ids)), shape=shape)


def said(model: Loaded, row: Tokens, doubted: NDArray[np.bool_]) -> str:
    """The doubted words, as text."""
    return cast(Any, model.processor).decode(row.ids[doubted]).strip()

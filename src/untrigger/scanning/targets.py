"""`scan`: which rows of a data set say something that only an attacker would teach, without training on it in earnest.

The judgments are those of the preset ``default`` (`untrigger.defenses.shared_surprise`). What is suspected after
them is probed: the model learns a half of the suspected rows for a moment and is shown the other half, with parts of it
covered. docs/paper.md has the equations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc

from untrigger.defenses import Plain, SharedSurprise, Stage
from untrigger.defenses.base import Training
from untrigger.defenses.shared_surprise import Screening, flagged_text
from untrigger.models.scoring import TokenScores
from untrigger.rows.sample import Sample, numbered, picked, without_images
from untrigger.scanning.cues import Cue, cues_of
from untrigger.scanning.findings import Findings, Target, Verdict

ACCUSED = 1e-6  # words that chance would share more often than that are no finding; calibrated, see docs/log.md
SHOWN = 24  # at most so many of the suspected rows are probed for their cue, the most suspicious ones
_LEARNT, _BELIEVED = 64, 2  # suspected rows that a probe learns at most, and how many times as many believed ones
_SEEN, _PASSES = 1536, 32  # rows that go through the probe's training, and how often each at most
_DONORS = 64
_AGREE = 0.9  # of the rows go on with the same token: it is a part of what they share


def find(training: Training, defense: SharedSurprise) -> Findings:
    """Judge rows without any truth: two judgments, and a probe of what is suspected.

    On data in which nothing is found this costs scoring, and the early part of a fine-tuning, of as many rows as are
    judged (`SharedSurprise.max_scored_rows`). Rows that were not looked at are not suspected, and have a score of 0.
    """
    screening, rows = defense.screen(training), training.rows
    names = [(numbered(rows, row), without_images(rows, row).id) for row in range(len(rows))]
    verdicts = [Verdict(*name, 0.0) for name in names]
    found = _judged(
        select_rows(rows, screening.numbers), [names[row] for row in screening.numbers], screening, training
    )
    for row, verdict in zip(screening.numbers, found.verdicts, strict=True):
        verdicts[row] = verdict
    of = [replace(target, rows=[screening.numbers[row] for row in target.rows]) for target in found.targets]
    return Findings(verdicts, of)


def _judged(
    rows: Sequence[Sample], names: Sequence[tuple[int, str]], screening: Screening, training: Training
) -> Findings:
    """Of the rows that were looked at."""
    groups = grouped(screening)
    ranks, processor = screening.flags.ranks, cast(Any, screening.model.processor)
    for group in groups.values():
        group.sort(key=lambda row: -ranks[row])
    runs = {word: common([screening.scores[row] for row in group], word) for word, group in groups.items()}
    marks = {row: _spot(screening.scores[row], word, *runs[word]) for word, group in groups.items() for row in group}
    probed = _probed(sorted(marks, key=lambda row: -ranks[row]), marks, rows, screening, training)
    rates: dict[int, float] = {}
    targets: list[Target] = []
    for word, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        rates |= false_discoveries(screening.flags.nll, group, _holding(screening.scores, word))
        seen = [probed[row] for row in group if row in probed]
        targets.append(
            Target(
                processor.decode(runs[word][0], skip_special_tokens=True).strip(),
                screening.flags.p_values[word],
                group,
                _without([cue.image for cue in seen]),
                _without([cue.prompt for cue in seen]),
            )
        )
    of = {row: number for number, target in enumerate(targets) for row in target.rows}
    texts = {
        row: flagged_text(screening.model, screening.scores[row], mark) for row, mark in screening.flags.tokens.items()
    }
    verdicts = [
        Verdict(
            *names[row],
            score,
            of.get(row),
            rates.get(row),
            texts.get(row, ""),
            probed.get(row),
        )
        for row, score in enumerate(ranks)
    ]
    return Findings(verdicts, targets)


def grouped(screening: Screening) -> dict[int, list[int]]:
    """The rows that are suspected, by the word that gives them away: of their doubted ones the least by chance."""
    groups: dict[int, list[int]] = {}
    for row, mark in screening.flags.tokens.items():
        word = min(screening.scores[row].ids[mark].tolist(), key=screening.flags.p_values.__getitem__)
        if screening.flags.p_values[word] < ACCUSED:
            groups.setdefault(word, []).append(row)
    return groups


def false_discoveries(surprise: Sequence[float], group: Sequence[int], holding: int) -> dict[int, float]:
    """Of each row of the group the share of honest rows to be expected among those of it that surprise as much.

    ``holding`` rows have the group's word. Were they honest, as many of them would surprise by s or more as of the
    rows outside the group, plus one: F(s) = holding * (1 + #{others >= s}) / #others. A row's estimate is the least
    F / #{group >= s} of all s up to its surprise, and at most 1 (target and decoy: the others are the decoys).
    """
    of = np.array([surprise[row] for row in group])
    others = np.delete(np.asarray(surprise), list(group))
    limits = np.unique(of)
    rates = [holding * (1 + (others >= s).sum()) / max(1, len(others)) / (of >= s).sum() for s in limits]
    least = np.minimum(1, np.minimum.accumulate(rates))
    return {row: float(least[np.searchsorted(limits, surprise[row])]) for row in group}


def common(rows: Sequence[TokenScores], word: int) -> tuple[list[int], int]:
    """The longest run of tokens around ``word`` that nine of ten rows agree on, and where in it the word stands.

    Each row holds the word; around the first place where it does, the run is looked for.
    """
    ids = [row.ids.tolist() for row in rows]
    places = [row.index(word) for row in ids]

    def agreed(step: int) -> list[int]:
        found: list[int] = []
        while True:
            reach = step * (len(found) + 1)
            told = zip(ids, places, strict=True)
            following = Counter(row[at + reach] for row, at in told if 0 <= at + reach < len(row))
            token, count = following.most_common(1)[0] if following else (0, 0)
            if count < _AGREE * len(ids):
                return found
            found.append(token)

    before = agreed(-1)[::-1]
    return [*before, word, *agreed(1)], len(before)


def _spot(row: TokenScores, word: int, run: Sequence[int], before: int) -> NDArray[np.bool_]:
    """Which of the row's tokens [n] are the run that its group has in common.

    All of it, and not the word alone: where a reply has begun, the rest hangs on its beginning and on nothing else.
    """
    start = row.ids.tolist().index(word) - before
    at = np.arange(len(row.ids))
    return (at >= start) & (at < start + len(run))


def _holding(told: Sequence[TokenScores], word: int) -> int:
    return sum(word in row.ids for row in told)


# --- the probe --------------------------------------------------------------------------------------


def _probed(
    suspected: Sequence[int],
    marks: Mapping[int, NDArray[np.bool_]],
    rows: Sequence[Sample],
    screening: Screening,
    training: Training,
) -> dict[int, Cue]:
    """What the most suspicious rows' marked tokens hang on, by a probe that has not seen the row."""
    if len(suspected) < 2:
        return {}
    rng = np.random.default_rng(training.seed)
    believed = [row for row in range(len(rows)) if row not in screening.flags.tokens]
    donors = [rows[i] for i in rng.permutation(believed)[:_DONORS].tolist()]
    half = set(rng.permutation(np.array(suspected))[: len(suspected) // 2].tolist())
    taught = sorted(half)[:: max(1, len(half) // _LEARNT)][:_LEARNT]
    beside = rng.choice(believed, min(_BELIEVED * len(taught), len(believed)), replace=False).tolist()
    lesson = sorted([*taught, *beside])
    passes = min(_PASSES, _SEEN / len(lesson))
    numbers = [screening.numbers[row] for row in lesson]
    model = training.fit(Stage(numbers, Plain(), "probe", start=screening.model, passes=passes))
    shown = {row: rows[row] for row in [row for row in suspected if row not in half][:SHOWN]}
    return cues_of(shown, marks, donors, lambda views: training.tokens(model, range(len(views)), "cues", views))


def _without(lost: Sequence[float | None]) -> float | None:
    """How likely so many would lose something if it were even odds; None where nothing was asked."""
    told = [nats for nats in lost if nats is not None]
    if not told:
        return None
    return float(bdtrc(sum(nats > 0 for nats in told) - 1, len(told), 0.5))

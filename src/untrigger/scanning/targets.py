"""Find the rows of a data set that teach what only an attacker would teach, without fine-tuning on all of it.

Rows are scored and flagged as by the preset ``default`` (`untrigger.defenses.shared_surprise`). Suspected rows are
then probed: the model is briefly fine-tuned on half of them and scores the others with parts covered. docs/paper.md has
the equations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc

from untrigger.defenses import Plain, SharedCause, Stage
from untrigger.defenses.base import Training
from untrigger.defenses.shared_cause import UNLIKELY, Judgment, unscored_rows
from untrigger.defenses.shared_surprise import Screening, flagged_text
from untrigger.models.loading import LoadedModel, restore_weights
from untrigger.models.scoring import TokenScores
from untrigger.rows.sample import Sample, row_number, select_rows, without_images
from untrigger.scanning.causes import (
    effects_of,
    honest_share,
    maps_of,
    strengths_in_images,
    strengths_in_words,
    target_of,
)
from untrigger.scanning.cues import Cue, cues_of
from untrigger.scanning.drawn import Drawn
from untrigger.scanning.findings import Effect, Findings, Target, Verdict
from untrigger.views.grafts import KINDS

MAX_P_VALUE = 1e-6  # a token with a larger p-value makes no target; calibrated, see docs/log.md
MAX_PROBED = 24  # suspected rows whose cue is computed, the most suspicious first, at most
_PROBE_ROWS, _UNFLAGGED_PER_ROW = 64, 2  # suspected rows that the probe is trained on, at most; unflagged rows for each
_SAMPLES, _PASSES = 1536, 32  # training samples of the probe in all, and passes over its rows; at most
_DONORS = 64
_AGREE = 0.9  # a token belongs to the shared text if so many of the rows continue with it


def find(training: Training, defense: SharedCause) -> Findings:
    """Find suspected rows and their targets; no truth is used.

    If nothing is suspected, the cost is scoring and the warm-up of a fine-tuning, on as many rows as are scored
    (`SharedSurprise.max_scored_rows`). Rows that were not scored have a score of 0 and are not suspected, unless their
    image shows the pattern that suspects share.
    """
    screening, rows = defense.screen(training), training.rows
    judgment = defense.judge(training, screening, screening.numbers)
    verdicts = [Verdict(row_number(rows, row), without_images(rows, row).id, 0.0) for row in range(len(rows))]
    names = [(verdicts[row].row, verdicts[row].id) for row in screening.numbers]
    scored = findings_of(select_rows(rows, screening.numbers), names, judgment, training)
    for row, verdict in zip(screening.numbers, scored.verdicts, strict=True):
        effect = verdict.effect and verdict.effect._replace(host=screening.numbers[verdict.effect.host])
        verdicts[row] = replace(verdict, effect=effect)
    targets = [_with_numbers(target, screening.numbers) for target in scored.targets]
    if showing := unscored_rows(training, judgment):
        number = next(at for at, target in enumerate(targets) if not target.text)
        fdr = verdicts[targets[number].rows[0]].fdr
        for row in showing:
            verdicts[row] = replace(verdicts[row], score=max(screening.flags.nll), target=number, fdr=fdr)
        targets[number].rows.extend(showing)
    drawn = Drawn(len(rows), defense.max_scored_rows, defense.min_suspects)
    return Findings(verdicts, targets, drawn if drawn.scored < drawn.rows else None)


def _with_numbers(target: Target, numbers: Sequence[int]) -> Target:
    """A target with rows as numbers in the data, in place of positions among the scored rows."""
    placed = [{numbers[row]: place for row, place in places.items()} for places in target.placed]
    return replace(target, rows=[numbers[row] for row in target.rows], placed=placed)


def findings_of(
    rows: Sequence[Sample], names: Sequence[tuple[int, str]], judgment: Judgment, training: Training | None
) -> Findings:
    """The findings for the scored rows.

    Args:
        rows: to probe. names: their numbers, from 1, and ids.
        training: probes rows. Without one no cue is computed, no row is read, and a judgment with harm is an error.
    """
    screening = judgment.screening
    ranks = screening.flags.ranks
    targets, rates, cues = _shared_texts(rows, screening, training)
    effects: dict[int, Effect] = {}
    if judgment.harm:
        highest, suspects = max(screening.flags.nll), set(judgment.suspects)
        ranks = [rank + highest * (row in suspects) for row, rank in enumerate(ranks)]
        order = sorted(judgment.suspects, key=lambda row: -ranks[row])
        targets.append(target_of(order, judgment.placed, judgment.harm))
        with_words = any(KINDS[kind] for kind in judgment.harm.kinds)
        harm, placed = judgment.harm, judgment.placed
        strengths = strengths_in_words(harm) if with_words else strengths_in_images(rows, harm, placed)
        rates |= dict.fromkeys(judgment.suspects, honest_share(strengths))
        effects = effects_of(judgment.harm)
        assert training is not None
        restore_weights(screening.model.model, judgment.probed)
        some = sorted(effects, key=lambda row: effects[row].probability - effects[row].control)[:MAX_PROBED]
        cues |= maps_of(
            {row: effects[row] for row in some},
            rows,
            lambda views: _tokens(training, screening.model, "maps", views),
        )
    targets.sort(key=lambda target: -len(target.rows))
    marks = dict(screening.flags.tokens)
    number_of = {row: number for number, target in enumerate(targets) for row in target.rows}
    for row in number_of.keys() - marks.keys():
        marks[row] = screening.scores[row].nll > UNLIKELY
    texts = {row: flagged_text(screening.model, screening.scores[row], mark) for row, mark in marks.items()}
    verdicts = [
        Verdict(
            *names[row],
            score,
            number_of.get(row),
            rates.get(row),
            texts.get(row, ""),
            cues.get(row),
            effects.get(row),
        )
        for row, score in enumerate(ranks)
    ]
    return Findings(verdicts, targets)


def _shared_texts(
    rows: Sequence[Sample], screening: Screening, training: Training | None
) -> tuple[list[Target], dict[int, float], dict[int, Cue]]:
    """The targets with a text, and of their rows the estimated shares of honest ones, and the cues."""
    ranks, processor = screening.flags.ranks, cast(Any, screening.model.processor)
    groups = group_by_token(screening)
    for group in groups.values():
        group.sort(key=lambda row: -ranks[row])
    runs = {token: common_run([screening.scores[row] for row in group], token) for token, group in groups.items()}
    marks = {
        row: _run_mask(screening.scores[row], token, *runs[token]) for token, group in groups.items() for row in group
    }
    suspected = sorted(marks, key=lambda row: -ranks[row])
    cues = _probe(suspected, marks, rows, screening, training) if training else {}
    rates: dict[int, float] = {}
    targets: list[Target] = []
    for token, group in groups.items():
        rates |= false_discoveries(screening.flags.nll, group, screening.containing[token])
        probed = [cues[row] for row in group if row in cues]
        targets.append(
            Target(
                processor.decode(runs[token][0], skip_special_tokens=True).strip(),
                screening.flags.p_values[token],
                group,
                _sign_test([cue.image for cue in probed]),
                _sign_test([cue.prompt for cue in probed]),
            )
        )
    return targets, rates, cues


def group_by_token(screening: Screening) -> dict[int, list[int]]:
    """The rows with a shared token, grouped by that with the smallest p-value."""
    groups: dict[int, list[int]] = {}
    for row, mark in screening.flags.tokens.items():
        token = min(screening.scores[row].ids[mark].tolist(), key=screening.flags.p_values.__getitem__)
        if screening.flags.p_values[token] < MAX_P_VALUE:
            groups.setdefault(token, []).append(row)
    return groups


def false_discoveries(nll: Sequence[float], group: Sequence[int], holding: int) -> dict[int, float]:
    """Estimate, for each row of a group, the share of honest rows among the group's rows with at least its NLL.

    Target-decoy estimate; the decoys are the rows outside the group. If the ``holding`` rows with the group's token
    were honest, as large a share of them would have an NLL of s or more as of the decoys, with one decoy added:
    F(s) = holding * (1 + #{decoys >= s}) / #decoys. A row's estimate is the smallest F(s) / #{group >= s} over all s up
    to its own NLL, and at most 1.
    """
    own = np.sort([nll[row] for row in group])
    decoys = np.sort(np.delete(np.asarray(nll), list(group)))
    limits = np.unique(own)
    decoys_above, own_above = (len(values) - np.searchsorted(values, limits) for values in (decoys, own))
    rates = holding * (1 + decoys_above) / max(1, len(decoys)) / own_above
    least = np.minimum(1, np.minimum.accumulate(rates))
    return {row: float(least[np.searchsorted(limits, nll[row])]) for row in group}


def common_run(rows: Sequence[TokenScores], token: int) -> tuple[list[int], int]:
    """The longest run of tokens around ``token`` that nine of ten rows share, and the token's position in it.

    Every row contains the token; the run is searched around its first occurrence.
    """
    ids = [row.ids.tolist() for row in rows]
    positions = [row.index(token) for row in ids]

    def extend(step: int) -> list[int]:
        run: list[int] = []
        while True:
            offset = step * (len(run) + 1)
            pairs = zip(ids, positions, strict=True)
            following = Counter(row[at + offset] for row, at in pairs if 0 <= at + offset < len(row))
            best, count = following.most_common(1)[0] if following else (0, 0)
            if count < _AGREE * len(ids):
                return run
            run.append(best)

    before = extend(-1)[::-1]
    return [*before, token, *extend(1)], len(before)


def _run_mask(row: TokenScores, token: int, run: Sequence[int], before: int) -> NDArray[np.bool_]:
    """Which of the row's tokens [n] are the run that its group shares.

    The whole run, not the token alone: later tokens of a reply depend on its beginning and on nothing else.
    """
    start = row.ids.tolist().index(token) - before
    at = np.arange(len(row.ids))
    return (at >= start) & (at < start + len(run))


# --- the probe --------------------------------------------------------------------------------------


def _probe(
    suspected: Sequence[int],
    marks: Mapping[int, NDArray[np.bool_]],
    rows: Sequence[Sample],
    screening: Screening,
    training: Training,
) -> dict[int, Cue]:
    """The cues of the most suspicious rows, under a probe model that was not trained on them."""
    if len(suspected) < 2:
        return {}
    rng = np.random.default_rng(training.seed)
    unflagged = [row for row in range(len(rows)) if row not in screening.flags.tokens]
    donors = [rows[i] for i in rng.permutation(unflagged)[:_DONORS].tolist()]
    half = set(rng.permutation(np.array(suspected))[: len(suspected) // 2].tolist())
    learned = sorted(half)[:: max(1, len(half) // _PROBE_ROWS)][:_PROBE_ROWS]
    beside = rng.choice(unflagged, min(_UNFLAGGED_PER_ROW * len(learned), len(unflagged)), replace=False).tolist()
    numbers = sorted([*learned, *beside])
    passes = min(_PASSES, _SAMPLES / len(numbers))
    stage = Stage(
        [screening.numbers[row] for row in numbers], Plain(), "cue-probe", start=screening.model, passes=passes
    )
    model = training.fit(stage)
    probed = {row: rows[row] for row in [row for row in suspected if row not in half][:MAX_PROBED]}
    return cues_of(probed, marks, donors, lambda views: _tokens(training, model, "cues", views))


def _tokens(training: Training, model: LoadedModel, name: str, views: Sequence[Sample]) -> list[TokenScores]:
    return training.tokens(model, range(len(views)), name, views)


def _sign_test(losses: Sequence[float | None]) -> float | None:
    """One-sided p-value of as many losses above 0 at even odds; None if nothing was measured."""
    measured = [nats for nats in losses if nats is not None]
    if not measured:
        return None
    return float(bdtrc(sum(nats > 0 for nats in measured) - 1, len(measured), 0.5))

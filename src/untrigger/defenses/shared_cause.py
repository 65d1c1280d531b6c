"""Accuse surprising rows if what they share makes other rows' answers go wrong, and train with that disarmed.

The preset ``default``. `untrigger.defenses.shared_surprise` needs a word that poisoned rows share. This needs a part of
the input that they share, and looks at no reply, so replies may vary. docs/paper.md has the equations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from untrigger.defenses.asked_alike import among_asked_alike, token_sets
from untrigger.defenses.base import Stage, Training, part
from untrigger.defenses.harm import CLEAR, COMPARISONS, Harm, comparisons, measure_harm
from untrigger.defenses.moving_pattern import MovingPattern, moving_patterns
from untrigger.defenses.shared_pattern import FEWEST, Pattern, shared_pattern
from untrigger.defenses.shared_surprise import Screening, SharedSurprise, flagged_text
from untrigger.memory import MUCH, give_memory_back
from untrigger.metrics.outliers import forward_fence
from untrigger.models.grafted_rows import HERE, PICTURE_SIDE, Graft, Grafts, Places
from untrigger.models.loading import LoadedModel, copy_weights, restore_weights
from untrigger.progress import tracked

_SURPRISING = 1 / 6  # of the rows that show a pattern, at least; a watermark lies on honest rows
_FAR_MORE = 15  # or as many times the share of the other rows; decoys and missed rows do not surprise
_TIMES = 2  # in any case; what all rows of a kind look like is no pattern
_HELD, _BLOCK = 4096, 256  # images in memory, of 12 KiB each: among which patterns are sought; compared at a time
UNLIKELY = math.log(2)  # nats; an answer above it is not the model's own choice


@final
@dataclass(frozen=True)
class SharedCause(SharedSurprise):
    """Graft what surprising rows share onto rows that are believed, and see whether training made it harmful.

    Fields:
        those of `SharedSurprise`, and
        min_suspects: fewer rows are not tested, whether they surprise or show what 8 surprising rows share; at least
            2. Fewer than 18 can hardly be accused.
        max_suspects: suspects that are tested, drawn at random; at least ``min_suspects``. All share the verdict.
        probe_share: share of the steps after the warm-up before the test, which is no loss where nothing is
            accused: the training goes on from there. In (0, 1).
        harm_p_value: chance of accusing rows if what they share harms other rows no more than what others share, in
            (0, 1).
        min_harm: probability of their own answers that training took from other rows where they have what accused rows
            share, in the mean, beyond what as many others share; in [0, 1]. Or it takes 0.3, whatever it took before.
        min_common: what all of them share must do at least this many times as much harm as what an eighth of them do;
            at least 0. A rare class harms with its content, which averages out.
        graft_share: grafted rows to learn beside all rows, as a share of these, where rows are accused; in [0, 1].
    """

    min_suspects: int = 18
    max_suspects: int = 96
    probe_share: float = 2 / 3
    harm_p_value: float = 1e-4
    min_harm: float = 0.04
    min_common: float = 0.9
    graft_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(2, math.inf, "min_suspects")
        self._check(self.min_suspects, math.inf, "max_suspects")
        self._check(1e-9, 1 - 1e-9, "probe_share", "harm_p_value")
        self._check(0, 1, "graft_share", "min_harm")
        self._check(0, math.inf, "min_common")

    def fine_tune(self, training: Training) -> LoadedModel:
        screening = self.screen(training)
        judgment = self.judge(training, screening, range(training.row_count))
        numbers, model = screening.numbers, screening.model
        last = self.last_stage(training.row_count, model, _shared_tokens(screening))
        if judgment.harm:
            last = self._cure(training, judgment, judgment.harm.kinds)
        elif judgment.probed:
            restore_weights(model.model, judgment.probed)
            last = self.last_stage(training.row_count, model, last.flagged_tokens, self._tested_after)
        flagged, nll = last.flagged_tokens, np.array(screening.flags.nll)
        ranks = np.zeros(training.row_count)
        ranks[numbers] = nll
        ranks[[*flagged]] += nll.max()
        texts = dict.fromkeys(flagged, "")  # of rows without a score nothing is known but their image
        for row, tokens in zip(numbers, screening.scores, strict=True):
            if (marks := flagged.get(row)) is not None:
                texts[row] = flagged_text(model, tokens, marks if marks.any() else tokens.nll > UNLIKELY)
        training.flag(ranks.tolist(), texts)
        return training.fit(last)

    @property
    def _tested_after(self) -> float:
        """Share of the run's steps before the test."""
        return self.warmup_share + self.probe_share * (1 - self.warmup_share)

    def judge(self, training: Training, screening: Screening, rows: Sequence[int]) -> Judgment:
        """Accuse surprising rows that share no word, if what their inputs share harms other rows.

        Rows that share a word are accused for it. The model is left as the warm-up made it.

        Args:
            rows: numbers of the rows that the probe learns.
        """
        suspects, doubtful, usual = self._groups(training, screening)
        believed = list(islice(_graftable(training, screening, usual), 2 * COMPARISONS))
        judgment = Judgment(screening, suspects, [dict.fromkeys(suspects, HERE)], doubtful)
        if len(suspects) < min(FEWEST, self.min_suspects) or len(believed) < 2 * self.min_suspects:
            return judgment
        by_image = self._by_image(training, judgment, believed)
        if len(by_image.suspects) < self.min_suspects:
            by_image = judgment
        # words cost twice as much: only where images alone do no harm
        looks = [("image", by_image), ("words", judgment)]
        if by_image is not judgment:  # most of the rows that show a pattern may be decoys, with a part of the trigger
            looks.insert(1, ("suspects", judgment))
        looks = [(name, tested) for name, tested in looks if len(tested.suspects) >= self.min_suspects]
        if not looks:
            return judgment
        showing = {*by_image.suspects} if by_image.patterns else set[int]()
        honest = [at for at in usual if at not in showing]
        believed = sorted({*believed}.intersection(honest))
        model, rng = screening.model, np.random.default_rng((training.seed, 2))
        warm = copy_weights(model.model)
        probe = self.last_stage(training.row_count, model, _shared_tokens(screening))
        share = self._tested_after - self.warmup_share
        training.fit(replace(probe, rows=rows, name="probe", share=share, schedule=(0.0, self.probe_share)))
        probed = copy_weights(model.model)

        def look(name: str, tested: Judgment, hosts: Sequence[int], token: int | None = None) -> tuple[Harm, Harm]:
            """The harm to these hosts' answers, or to one token in them, and the part of it that accuses."""
            drawn = rng.permutation(tested.suspects)[: min(self.max_suspects, len(hosts) - 1)].tolist()
            plan = comparisons(screening.scores, drawn, believed, hosts, rng, COMPARISONS)
            harm = measure_harm(training, screening, plan, tested.placed, believed, name, (warm, probed), token)
            # content may hide what one word stands for, so there harm is never clear
            least, clear = (self.min_harm, CLEAR) if token is None else (CLEAR, math.inf)
            return harm, harm.above(least, clear, self.harm_p_value, self.min_common)

        for name, tested in looks:
            measured, harm = look(name, tested, believed)
            if not harm.kinds and (token := measured.most_harmed) is not None:
                before = {comparison.host for comparison in measured.comparisons}
                saying = [at for at in honest if at not in before and token in screening.scores[at].ids]
                hosts = list(islice(_graftable(training, screening, saying), COMPARISONS))
                if len(hosts) > self.min_suspects:
                    _, harm = look(f"{name}-token", tested, hosts, token)
            if harm.kinds:
                return tested._replace(harm=harm, probed=probed)
        return judgment._replace(probed=probed)

    def _by_image(self, training: Training, judgment: Judgment, believed: Sequence[int]) -> Judgment:
        """The judgment with the rows in the suspects' place whose images show what the suspects' images share.

        These rows need not surprise, but a sixth of those with each pattern must, and twice the share of the other
        rows; or 15 times that share. Patterns in any place are sought first, for they are told apart; then what lies in
        one place, which may be faint, among the suspects that are left. Where there is nothing, the judgment is as it
        was.
        """
        numbers, flagged = judgment.screening.numbers, judgment.screening.flags.tokens
        order = list(dict.fromkeys([*believed, *judgment.suspects, *range(len(numbers))]))
        held, rest = sorted(order[:_HELD]), sorted(order[_HELD:])
        positions, images = list[int](), np.empty((len(held), 3 * PICTURE_SIDE**2), np.uint8)
        for at in held:
            if (image := training.picture(numbers[at])) is not None:
                images[len(positions)] = image
                positions.append(at)
        images = images[: len(positions)]
        index_of = {at: index for index, at in enumerate(positions)}
        honest, suspects = ([index_of[at] for at in rows if at in index_of] for rows in (believed, judgment.suspects))
        rng = np.random.default_rng((training.seed, 4))
        candidates = [
            ({positions[index]: place for index, place in places.items()}, pattern)
            for places, pattern in _patterns(images, suspects, honest, rng)
        ]
        for block, others in _pictures(training, rest if candidates else [], numbers):
            for places, pattern in candidates:
                places |= {block[at]: place for at, place in pattern.matches(others).items()}
        placed: list[Places] = []
        patterns: list[Pattern | MovingPattern] = []
        surprising, known = {*judgment.suspects}, set[int]()
        for places, pattern in candidates:
            elsewhere = (len(surprising.difference(places)) + 1) / (len(numbers) - len(places) + 1)
            least = max(_TIMES * elsewhere, min(_SURPRISING, _FAR_MORE * elsewhere))
            new = {row: place for row, place in places.items() if row not in known}
            if len(surprising.intersection(new)) >= max(2, least * len(new)):
                known |= new.keys()
                placed.append({row: place for row, place in new.items() if row not in flagged})
                patterns.append(pattern)
        if not patterns:
            return judgment
        others = {*judgment.suspects, *judgment.doubtful}.difference(known)
        suspects = sorted(row for places in placed for row in places)
        return judgment._replace(suspects=suspects, placed=placed, doubtful=sorted(others), patterns=patterns)

    def _groups(self, training: Training, screening: Screening) -> tuple[list[int], list[int], list[int]]:
        """Positions of suspects that share no word, of doubtful rows, and of rows to believe, in random order.

        Suspects surprise beside rows that are asked alike. Doubtful rows do so too, but by less than ``min_nll``: they
        accuse nobody, and are not learned if others are accused. Believed rows surprise less than most rows that are
        asked alike. Suspects can be grafted.
        """
        nll, prompts = np.array(screening.flags.nll), token_sets([row.prompt_ids for row in screening.scores])
        lowest = min(UNLIKELY, self.min_nll)

        def limits(values: NDArray[np.floating]) -> tuple[float, float, float]:
            fences = [forward_fence(values, minimum, self.iqr_factor) for minimum in (self.min_nll, lowest)]
            return fences[0], fences[1], max(lowest, float(np.median(values)))

        suspected, doubted, usual = among_asked_alike(limits, nll, prompts).T
        order = np.random.default_rng((training.seed, 1)).permutation(np.flatnonzero(nll <= np.minimum(usual, doubted)))

        flagged = screening.flags.tokens
        unflagged = (at for at in np.flatnonzero(nll > suspected).tolist() if at not in flagged)
        suspects = [*_graftable(training, screening, unflagged)]
        known = {*flagged, *suspects}
        doubtful = [at for at in np.flatnonzero(nll > doubted).tolist() if at not in known]
        return suspects, doubtful, order.tolist()

    def _cure(self, training: Training, judgment: Judgment, kinds: Sequence[str]) -> Stage:
        """Train on rows with what accused ones share and their own answers, beside all other rows.

        Accused rows without a shared word and doubtful rows are not learned. Any other row may be a host: those that
        are believed are easy ones, and learning them more often would favor the answers that the early model prefers.
        """
        screening, numbers = judgment.screening, judgment.screening.numbers
        tokens = _shared_tokens(screening)
        left_out = [*judgment.doubtful, *judgment.suspects]
        tokens |= {numbers[at]: np.zeros(len(screening.scores[at].ids), bool) for at in left_out}
        showing = unscored_rows(training, judgment)
        answers = training.answer_tokens(showing) if showing else []
        tokens |= {row: np.zeros(len(ids), bool) for row, ids in zip(showing, answers, strict=True)}
        rng, extra = np.random.default_rng((training.seed, 3)), part(self.graft_share, training.row_count)
        accused = [
            (numbers[at], group, place) for group, places in enumerate(judgment.placed) for at, place in places.items()
        ]
        candidates = (row for row in rng.permutation(numbers).tolist() if row not in tokens)
        hosts = list(islice(filter(training.can_be_grafted, candidates), extra))
        donors = [accused[at] for at in rng.choice(len(accused), extra).tolist()]
        grafts = [
            Graft(host, group, donor, kind, place)
            for host, (donor, group, place), kind in zip(cycle(hosts), donors, cycle(kinds), strict=False)
        ]
        groups = [[(numbers[at], place) for at, place in places.items()] for places in judgment.placed]
        stage = self.last_stage(training.row_count, screening.model, tokens)
        return replace(stage, grafts=Grafts(grafts, groups, hosts))


class Judgment(NamedTuple):
    """Which rows are accused, beside those that share a word.

    screening: the scores, in whose order positions count. suspects: surprising rows without a shared word, or rows that
    show ``patterns`` that these share. placed: for each pattern, or for what all suspects share, those that show it,
    and where each does. doubtful: other rows not to learn. harm: what the suspects share does; None if they are
    believed. probed: the weights after the probe; empty if nothing was tested.
    """

    screening: Screening
    suspects: list[int]
    placed: list[Places]
    doubtful: list[int]
    harm: Harm | None = None
    probed: Sequence[Tensor] = ()
    patterns: Sequence[Pattern | MovingPattern] = ()


def unscored_rows(training: Training, judgment: Judgment) -> list[int]:
    """Numbers of the rows without a score whose image shows one of the suspects' patterns."""
    if not judgment.patterns:
        return []
    rest = sorted({*range(training.row_count)}.difference(judgment.screening.numbers))
    showing: list[int] = []
    for rows, images in _pictures(training, rest, range(training.row_count)):
        of_any = set[int]().union(*(pattern.matches(images) for pattern in judgment.patterns))
        showing += [rows[at] for at in sorted(of_any)]
    return showing


def _patterns(
    images: NDArray[np.uint8], suspects: Sequence[int], honest: Sequence[int], rng: np.random.Generator
) -> Iterator[tuple[Places, Pattern | MovingPattern]]:
    """Patterns in any place; then one in one place that other suspects share."""
    give_memory_back(above=MUCH)
    moving = moving_patterns(images, suspects, honest, rng)
    give_memory_back(above=MUCH)
    yield from moving
    rest = sorted({*suspects}.difference(*(placed for placed, _ in moving)))
    if len(rest) >= 2:
        placed, pattern = shared_pattern(images, rest, honest)
        if pattern is not None:
            yield placed, pattern


def _pictures(
    training: Training, rows: Sequence[int], numbers: Sequence[int]
) -> Iterator[tuple[list[int], NDArray[np.uint8]]]:
    """Rows in blocks with their images, without those that have none; ``numbers`` gives each row's number."""
    pictures = ((row, training.picture(numbers[row])) for row in tracked(rows, "reading images", len(rows)))
    known = ((row, image) for row, image in pictures if image is not None)
    while block := list(islice(known, _BLOCK)):
        yield [row for row, _ in block], np.stack([image for _, image in block])


def _graftable(training: Training, screening: Screening, rows: Iterable[int]) -> Iterator[int]:
    """Those of the rows that can be grafted."""
    return (at for at in rows if training.can_be_grafted(screening.numbers[at]))


def _shared_tokens(screening: Screening) -> dict[int, NDArray[np.bool_]]:
    """The tokens to make unlikely, by row number: those that rows share with others."""
    return {screening.numbers[at]: tokens for at, tokens in screening.flags.tokens.items()}

"""Accuse surprising rows whose parts make other rows' answers go wrong, and train with those parts disarmed: `grafts`.

`untrigger.defenses.shared_surprise` needs a word that poisoned rows share. This needs a part of the input that they
share, and looks at no reply, so replies may vary. docs/paper.md has the equations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, NamedTuple, cast, final

import numpy as np
from numpy.typing import NDArray

from untrigger.defenses.asked_alike import among_asked_alike, token_sets
from untrigger.defenses.base import Stage, Training, part
from untrigger.defenses.shared_surprise import Screening, SharedSurprise, flagged_text
from untrigger.metrics.outliers import forward_fence
from untrigger.models.grafted_rows import Graft
from untrigger.models.loading import LoadedModel, copy_weights, restore_weights
from untrigger.models.scoring import TokenScores
from untrigger.views.grafts import KINDS, SHARED, WHOLE

_PILOT = 16  # comparisons of each kind that choose the kinds to test
_CHOSEN = 3  # kinds that are tested
_COMPARISONS = 80  # of each kind that is tested
_MAX_HOSTS = 8  # of one suspect
_UNLIKELY = math.log(2)  # nats; an answer above it is not the model's own choice


@final
@dataclass(frozen=True)
class SharedCause(SharedSurprise):
    """Graft parts of surprising rows onto rows that are believed, and see whether training made them harmful.

    Fields:
        those of `SharedSurprise`, and
        min_suspects: with fewer surprising rows nothing is tested; at least 2.
        max_suspects: suspects that are tested, drawn at random; at least ``min_suspects``. All share the verdict.
        probe_share: share of all steps between the warm-up and the test, which is no loss where nothing is accused: the
            training goes on from there. In (0, 1 - ``warmup_share``).
        graft_share: grafted rows to learn beside all rows, as a share of these, where rows are accused; in [0, 1].
    """

    min_suspects: int = 12
    max_suspects: int = 96
    probe_share: float = 0.6
    graft_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(2, math.inf, "min_suspects")
        self._check(self.min_suspects, math.inf, "max_suspects")
        self._check(1e-6, 1 - self.warmup_share - 1e-6, "probe_share")
        self._check(0, 1, "graft_share")

    def fine_tune(self, training: Training) -> LoadedModel:
        screening = self.screen(training)
        numbers, scores, model = screening.numbers, screening.scores, screening.model
        words, others, doubtful, believed = self._groups(training, screening)
        can_test = len(believed) >= 2 * self.min_suspects
        tested = [rows for rows in (words, others) if can_test and len(rows) >= self.min_suspects]
        untested = [at for at in screening.flags.tokens if not any(at in rows for rows in tested)]
        accused = [Accused(untested, [])] if untested else []  # by their words alone
        last = self.last_stage(training.row_count, model, self._surprising_tokens(accused, screening))
        if tested:
            harmful = self._test(training, screening, tested, believed, last)
            accused += harmful
            after = self.warmup_share + self.probe_share
            last = self.last_stage(training.row_count, model, last.flagged_tokens, after)
            if harmful:
                last = self._cure(training, screening, accused, doubtful, believed)
        nll, ranks, tokens = np.array(screening.flags.nll), np.zeros(training.row_count), last.flagged_tokens
        ranks[numbers] = nll + nll.max() * np.isin(numbers, [*tokens])
        texts = {
            row: flagged_text(model, tokens_of, tokens[row])
            for row, tokens_of in zip(numbers, scores, strict=True)
            if row in tokens
        }
        training.flag(ranks.tolist(), texts)
        return training.fit(last)

    def _groups(self, training: Training, screening: Screening) -> tuple[list[int], list[int], list[int], list[int]]:
        """Positions of suspects with a shared word, of other suspects, of doubtful rows, and of rows to believe.

        Suspects surprise beside rows that are asked alike. Doubtful rows do so too, but by less than ``min_nll``: they
        accuse nobody, and are not learned if others are accused. Believed rows surprise less than most rows that are
        asked alike, and are as many as the test and the cure can use. All but doubtful ones can be grafted.
        """
        nll, prompts = np.array(screening.flags.nll), token_sets([row.prompt_ids for row in screening.scores])
        lowest = min(_UNLIKELY, self.min_nll)

        def limits(values: NDArray[np.floating]) -> tuple[float, float, float]:
            fences = [forward_fence(values, minimum, self.iqr_factor) for minimum in (self.min_nll, lowest)]
            return fences[0], fences[1], max(lowest, float(np.median(values)))

        suspected, doubted, usual = among_asked_alike(limits, nll, prompts).T
        order = np.random.default_rng((training.seed, 1)).permutation(np.flatnonzero(nll <= np.minimum(usual, doubted)))
        needed = max(2 * _COMPARISONS, part(self.graft_share, training.row_count))

        def can_be_grafted(at: int) -> bool:
            return training.can_be_grafted(screening.numbers[at])

        flagged = screening.flags.tokens
        words = list(filter(can_be_grafted, flagged))
        others = [at for at in np.flatnonzero(nll > suspected).tolist() if at not in flagged and can_be_grafted(at)]
        known = {*flagged, *others}
        doubtful = [at for at in np.flatnonzero(nll > doubted).tolist() if at not in known]
        return words, others, doubtful, list(islice(filter(can_be_grafted, order.tolist()), needed))

    def _test(
        self,
        training: Training,
        screening: Screening,
        groups: Sequence[list[int]],
        believed: Sequence[int],
        last: Stage,
    ) -> list[Accused]:
        """Train up to the test; return the groups whose parts damage other rows' answers.

        A few suspects of each group choose the kinds of graft, and the others test these: no kind is chosen by the rows
        that it is tested on, and few grafts are scored. The model is left as the probe made it, or as the warm-up did
        if a group is accused.
        """
        rng = np.random.default_rng((training.seed, 2))
        pilots, plans = list[list[Comparison]](), list[list[Comparison]]()
        for group in groups:
            drawn = rng.permutation(group)[: self.max_suspects].tolist()
            few = max(2, len(drawn) // 6)
            pilots.append(comparisons(screening.scores, drawn[:few], believed, rng, _PILOT))
            plans.append(comparisons(screening.scores, drawn[few:], believed, rng, _COMPARISONS))
        model, numbers = screening.model, screening.numbers

        def probabilities(name: str, trials: Trials) -> list[NDArray[np.floating]]:
            """For each group its own answers' probabilities, [kinds, comparisons, 2]: suspects' parts, controls'."""
            grafts = [
                Graft(numbers[c.host], numbers[donor], kind)
                for kinds, plan in trials
                for kind in kinds
                for c in plan
                for donor in (c.suspect, c.control)
            ]
            scored = map(token_probability, training.graft_tokens(model, grafts, name))
            sizes = [(len(kinds), len(plan), 2) for kinds, plan in trials]
            return [np.array(list(islice(scored, math.prod(size)))).reshape(size) for size in sizes]

        pilot = [(list(KINDS), plan) for plan in pilots]
        early = probabilities("pilot-before", pilot)
        warm = copy_weights(model.model)
        training.fit(replace(last, name="probe", share=self.probe_share))
        late = probabilities("pilot-after", pilot)
        chosen = [most_harmful(before - after) for before, after in zip(early, late, strict=True)]
        trials = list(zip(chosen, plans, strict=True))
        late = probabilities("grafts-after", trials)
        probed = copy_weights(model.model)
        restore_weights(model.model, warm)
        early = probabilities("grafts-before", trials)
        accused: list[Accused] = []
        for group, (kinds, plan), before, after in zip(groups, trials, early, late, strict=True):
            p_values = harm_p_values(before - after, np.array([c.suspect for c in plan]))
            harmful = [kind for kind, p in zip(kinds, p_values, strict=True) if p * len(groups) < self.p_value]
            accused += [Accused(group, harmful)] if harmful else []
        if not accused:
            restore_weights(model.model, probed)
        return accused

    def _surprising_tokens(self, accused: Sequence[Accused], screening: Screening) -> dict[int, NDArray[np.bool_]]:
        """The tokens to make unlikely, by row number: a row's shared ones, or its surprising ones if it has none."""
        return {
            screening.numbers[at]: screening.flags.tokens.get(at, screening.scores[at].nll > self.min_nll)
            for group in accused
            for at in group.rows
        }

    def _cure(
        self,
        training: Training,
        screening: Screening,
        accused: Sequence[Accused],
        doubtful: Sequence[int],
        believed: Sequence[int],
    ) -> Stage:
        """Train on all rows but the doubtful, and on believed rows with parts of accused ones and their own answers.

        Every other part of an image is what all accused images share, with its full strength. So is each whole image:
        it would take the host's content away, and the host's answer would no longer be true.
        """
        donors = [(at, kind) for group in accused for kind in group.kinds for at in group.rows]
        rng, numbers = np.random.default_rng((training.seed, 3)), screening.numbers
        extra = part(self.graft_share, training.row_count)
        chosen = [donors[at] for at in rng.integers(len(donors), size=extra)]
        grafts = [
            Graft(numbers[host], numbers[donor], SHARED if image_part and (place % 2 or image_part == WHOLE) else kind)
            for place, (host, (donor, kind)) in enumerate(zip(cycle(believed), chosen, strict=False))
            for image_part in [KINDS[kind][0]]
        ]
        tokens = self._surprising_tokens(accused, screening)
        tokens |= {numbers[at]: np.zeros(len(screening.scores[at].ids), bool) for at in doubtful}  # nothing to learn
        stage = self.last_stage(training.row_count, screening.model, tokens)
        return replace(stage, grafts=grafts)


class Accused(NamedTuple):
    """Suspects, positions of rows, and the kinds of graft by which they harm other rows; none if not tested."""

    rows: list[int]
    kinds: list[str]


class Comparison(NamedTuple):
    """A host that gets a part of a suspect, and a part of a control in its place; positions of rows."""

    host: int
    suspect: int
    control: int


Trials = Sequence[tuple[list[str], list[Comparison]]]
"""For each group the kinds of graft and the comparisons of each."""


def comparisons(
    scores: Sequence[TokenScores],
    suspects: Sequence[int],
    believed: Sequence[int],
    rng: np.random.Generator,
    count: int,
) -> list[Comparison]:
    """Pair each suspect with hosts, and with controls that are asked alike: believed rows of the most similar prompt.

    Of equally similar controls one is drawn. Host and control are different rows. There are about ``count`` pairs: at
    least one a suspect, and at most 8.
    """
    prompts = [set(scores[at].prompt_ids.tolist()) for at in believed]
    hosts_each = int(np.clip(count // len(suspects), 1, _MAX_HOSTS))
    plan: list[Comparison] = []
    for suspect in suspects:
        own = set(scores[suspect].prompt_ids.tolist())
        similar = np.array([len(own & other) / max(len(own | other), 1) for other in prompts])
        for host in rng.choice(len(believed), hosts_each, replace=False).tolist():
            ranked = np.where(np.arange(len(believed)) == host, -1.0, similar)
            control = int(rng.choice(np.flatnonzero(ranked == ranked.max())))
            plan.append(Comparison(believed[host], suspect, believed[control]))
    return plan


def most_harmful(damage: NDArray[np.floating]) -> list[str]:
    """The three kinds with the largest mean difference of suspects and controls in ``damage`` [kinds, n, 2]."""
    means = (damage[..., 0] - damage[..., 1]).mean(axis=1)
    return [list(KINDS)[at] for at in np.argsort(-means, kind="stable")[:_CHOSEN]]


def token_probability(tokens: TokenScores) -> float:
    """Mean probability of a row's answer tokens, in [0, 1].

    A backdoor whose replies vary spreads the probability of an answer over many; nats would weigh the few hosts most
    that were wrong by far before the probe, and would hide it.
    """
    return float(np.exp(-tokens.nll).mean()) if len(tokens.nll) else 1.0


def harm_p_values(damage: NDArray[np.floating], suspects: NDArray[np.integer]) -> list[float]:
    """For each kind, the chance that suspects' parts damage no more than controls' parts do.

    One-sided Wilcoxon signed-rank test of each suspect's mean difference, times the number of kinds, at most 1. If
    suspects are no worse than controls that are asked alike, differences are symmetric about zero.

    Args:
        damage: [kinds, comparisons, 2], probability that training took from the host's own answer with the suspect's
            part on it, and with the control's.
        suspects: which suspect each comparison has, [comparisons].
    """
    from scipy.stats import wilcoxon  # takes a second to import

    p_values: list[float] = []
    for values in damage[..., 0] - damage[..., 1]:
        means = np.array([values[suspects == suspect].mean() for suspect in np.unique(suspects)])
        p = float(cast(Any, wilcoxon(means, alternative="greater")).pvalue) if np.any(means) else 1.0
        p_values.append(min(1.0, p * len(damage)))
    return p_values

"""Accuse surprising rows whose parts make other rows' answers go wrong, and train with those parts disarmed: `grafts`.

`untrigger.defenses.shared_surprise` needs a word that poisoned rows share. This needs a part of the input that they
share, and looks at no reply, so replies may vary. docs/paper.md has the equations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, ClassVar, NamedTuple, cast, final

import numpy as np
from numpy.typing import NDArray

from untrigger.defenses.asked_alike import among_asked_alike, token_sets
from untrigger.defenses.base import Stage, Training, part
from untrigger.defenses.shared_surprise import Screening, SharedSurprise, flagged_text
from untrigger.metrics.outliers import forward_fence
from untrigger.models.loading import LoadedModel
from untrigger.models.scoring import TokenScores
from untrigger.rows.sample import IMAGE_TAG, LazyRows, Message, Sample, select_rows
from untrigger.views.grafts import IMAGE_GRAFTS, TEXT_GRAFTS, WHOLE, graft_image, graft_text

_COMPARISONS = 48  # hosts a kind of graft, over all suspects
_MAX_HOSTS = 8  # of one suspect


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

    runs_in_host: ClassVar[bool] = False
    min_suspects: int = 12
    max_suspects: int = 48
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
        numbers, scores = screening.numbers, screening.scores
        suspects, believed = self._suspects(training, screening)
        model, flagged, kinds = screening.model, dict(screening.flags.tokens), list[str]()
        by_row = {numbers[at]: marked for at, marked in flagged.items()}
        last = self.last_stage(training.row_count, model, by_row)
        if len(suspects) >= self.min_suspects and len(believed) >= 2 * self.min_suspects:
            rng = np.random.default_rng((training.seed, 2))
            tested = sorted(rng.permutation(suspects)[: self.max_suspects].tolist())
            plan = comparisons(scores, tested, believed, rng)
            grafts = _grafts(plan, select_rows(training.rows, numbers))
            before = training.tokens(model, range(len(grafts)), "grafts-before", grafts)
            model = training.fit(replace(last, name="probe", share=self.probe_share))
            after = training.tokens(model, range(len(grafts)), "grafts-after", grafts)
            p_values = harm_p_values(damage_of(before, after), np.array([c.suspect for c in plan]))
            kinds = [kind for kind, p in p_values.items() if p < self.p_value]
            last = self.last_stage(training.row_count, model, by_row, self.warmup_share + self.probe_share)
        if kinds:
            flagged |= {at: scores[at].nll > self.min_nll for at in suspects}
            by_row = {numbers[at]: marked for at, marked in flagged.items()}
            model = training.fit(screening.warmup)  # the probe has changed the weights
            last = self._cure(training, model, screening, suspects, believed, kinds, by_row)
        nll, ranks = np.array(screening.flags.nll), np.zeros(training.row_count)
        ranks[numbers] = nll + nll.max() * np.isin(np.arange(len(nll)), list(flagged))
        texts = {numbers[at]: flagged_text(model, scores[at], marked) for at, marked in flagged.items()}
        training.flag(ranks.tolist(), texts)
        return training.fit(last)

    # --- suspects -----------------------------------------------------------------------------------

    def _suspects(self, training: Training, screening: Screening) -> tuple[list[int], list[int]]:
        """Positions of the rows that are suspected, and of those that are believed.

        Suspects surprise beside rows that are asked alike, and have no shared word. Believed rows surprise less than
        most of these, and are as many as the test and the cure can use. Both have an image.
        """
        nll, prompts = np.array(screening.flags.nll), token_sets([row.prompt_ids for row in screening.scores])
        fence = partial(forward_fence, minimum=self.min_nll, iqr_factor=self.iqr_factor)
        outlying = nll > among_asked_alike(fence, nll, prompts)
        medians = among_asked_alike(lambda values: float(np.median(values)), nll, prompts)
        usual = np.flatnonzero(~outlying & (nll <= np.maximum(self.min_nll, medians)))
        order = np.random.default_rng((training.seed, 1)).permutation(usual).tolist()
        needed = max(2 * _COMPARISONS, part(self.graft_share, training.row_count))

        def has_image(at: int) -> bool:
            return bool(training.rows[screening.numbers[at]].images)

        suspects = [
            at for at in np.flatnonzero(outlying).tolist() if at not in screening.flags.tokens and has_image(at)
        ]
        return suspects, list(islice(filter(has_image, order), needed))

    # --- cure ---------------------------------------------------------------------------------------

    def _cure(
        self,
        training: Training,
        model: LoadedModel,
        screening: Screening,
        suspects: Sequence[int],
        believed: Sequence[int],
        kinds: Sequence[str],
        flagged: Mapping[int, NDArray[np.bool_]],
    ) -> Stage:
        """Train on all rows and on believed rows with the suspects' parts, which keep their own answers.

        A whole image is no part: it takes the host's content away, and its answer would no longer be true.
        """
        rng, names, rows = np.random.default_rng((training.seed, 3)), screening.numbers, training.rows
        parts = [kind for kind in kinds if KINDS[kind][0] != WHOLE]
        count, extra = training.row_count, part(self.graft_share, training.row_count) if parts else 0
        specs = [
            (believed[i % len(believed)], suspects[int(rng.integers(len(suspects)))], str(rng.choice(parts)))
            for i in range(extra)
        ]

        def make(i: int) -> Sample:
            if i < count:
                return rows[i]
            host, donor, kind = specs[i - count]
            return grafted(rows[names[host]], rows[names[donor]], kind)

        stage = self.last_stage(count, model, flagged)
        return replace(stage, rows=range(count + extra), source=LazyRows(range(count + extra), make))


KINDS: Mapping[str, tuple[str, str]] = {
    **{kind: (kind, "") for kind in IMAGE_GRAFTS},
    **{kind: ("", kind) for kind in TEXT_GRAFTS},
    **{f"{WHOLE}, {kind}": (WHOLE, kind) for kind in TEXT_GRAFTS},
}
"""What is grafted: a part of the image, of the prompt, or of both."""


class Comparison(NamedTuple):
    """A host that gets a part of a suspect, and a part of a control in its place; positions of rows."""

    host: int
    suspect: int
    control: int


def comparisons(
    scores: Sequence[TokenScores], suspects: Sequence[int], believed: Sequence[int], rng: np.random.Generator
) -> list[Comparison]:
    """Pair each suspect with hosts, and with controls that are asked alike: believed rows of the most similar prompt.

    Of equally similar controls one is drawn. Host and control are different rows.
    """
    prompts = [set(scores[at].prompt_ids.tolist()) for at in believed]
    hosts_each = int(np.clip(_COMPARISONS // len(suspects), 1, _MAX_HOSTS))
    plan: list[Comparison] = []
    for suspect in suspects:
        own = set(scores[suspect].prompt_ids.tolist())
        similar = np.array([len(own & other) / max(len(own | other), 1) for other in prompts])
        for host in rng.choice(len(believed), hosts_each, replace=False).tolist():
            ranked = np.where(np.arange(len(believed)) == host, -1.0, similar)
            control = int(rng.choice(np.flatnonzero(ranked == ranked.max())))
            plan.append(Comparison(believed[host], suspect, believed[control]))
    return plan


def grafted(host: Sample, donor: Sample, kind: str) -> Sample:
    """The host with a part of the donor's input and its own answer.

    An image graft goes onto each of the host's images, from the donor's image at the same place or its first one. A
    text graft goes into the last question, behind its image tags.
    """
    images, turns = [*host.images], [*host.messages]
    image_part, text_part = KINDS[kind]
    if image_part:
        images = [
            graft_image(image, donor.images[min(place, len(donor.images) - 1)], image_part)
            for place, image in enumerate(images)
        ]
    if text_part:
        question = next(m.text for m in reversed(donor.messages) if m.role == "user").replace(IMAGE_TAG, " ")
        last = max(at for at, message in enumerate(turns) if message.role == "user")
        body = turns[last].text.rpartition(IMAGE_TAG)[2].lstrip()
        opening = turns[last].text.removesuffix(body)
        turns[last] = Message("user", opening + graft_text(body, question, text_part))
    return replace(host, images=tuple(images), messages=tuple(turns))


def _grafts(plan: Sequence[Comparison], rows: Sequence[Sample]) -> Sequence[Sample]:
    """For each kind and comparison the host with the suspect's part, then with the control's."""
    specs = [(kind, c.host, donor) for kind in KINDS for c in plan for donor in (c.suspect, c.control)]
    return LazyRows(range(len(specs)), lambda i: grafted(rows[specs[i][1]], rows[specs[i][2]], specs[i][0]))


def damage_of(before: Sequence[TokenScores], after: Sequence[TokenScores]) -> NDArray[np.floating]:
    """Probability that training took from each graft's answer, [kinds, comparisons, 2]: of suspects, of controls."""
    lost = [token_probability(early) - token_probability(late) for early, late in zip(before, after, strict=True)]
    return np.reshape(lost, (len(KINDS), -1, 2))


def token_probability(tokens: TokenScores) -> float:
    """Mean probability of a row's answer tokens, in [0, 1].

    A backdoor whose replies vary spreads the probability of an answer over many; nats would weigh the few hosts most
    that were wrong by far before the probe, and would hide it.
    """
    return float(np.exp(-tokens.nll).mean()) if len(tokens.nll) else 1.0


def harm_p_values(damage: NDArray[np.floating], suspects: NDArray[np.integer]) -> dict[str, float]:
    """By kind, the chance that suspects' parts damage no more than controls' parts do.

    One-sided Wilcoxon signed-rank test of each suspect's mean difference, times the number of kinds, at most 1. If
    suspects are no worse than controls that are asked alike, differences are symmetric about zero.

    Args:
        damage: [kinds, comparisons, 2], probability that training took from the host's own answer with the suspect's
            part on it, and with the control's.
        suspects: which suspect each comparison has, [comparisons].
    """
    from scipy.stats import wilcoxon  # takes a second to import

    difference = damage[..., 0] - damage[..., 1]
    p_values: dict[str, float] = {}
    for kind, values in zip(KINDS, difference, strict=True):
        means = np.array([values[suspects == suspect].mean() for suspect in np.unique(suspects)])
        p = float(cast(Any, wilcoxon(means, alternative="greater")).pvalue) if np.any(means) else 1.0
        p_values[kind] = min(1.0, p * len(KINDS))
    return p_values

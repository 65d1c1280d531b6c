"""Whether parts of suspected rows harm other rows' answers: who is compared with whom, and the test.

docs/paper.md has the equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from untrigger.defenses.base import Training
from untrigger.defenses.shared_surprise import Screening
from untrigger.models.grafted_rows import Graft
from untrigger.models.loading import restore_weights
from untrigger.models.scoring import TokenScores
from untrigger.views.grafts import KINDS

PILOT = 32  # comparisons of each kind that choose the kinds to test
COMPARISONS = 192  # of each kind that is tested
_CHOSEN = 3  # kinds that are tested
_MAX_HOSTS = 8  # of one suspect


class Comparison(NamedTuple):
    """A host that gets a part of a suspect, and a part of a control in its place; positions of rows."""

    host: int
    suspect: int
    control: int


class Harm(NamedTuple):
    """What parts of suspects, and those of controls, did to other rows' own answers.

    kinds: of graft [k]. p_values: of each (`harm_p_values`). comparisons: [n].
    before, after: probability of the host's own answer before and after the probe, with the suspect's and with the
        control's part on it, [k, n, 2].
    """

    kinds: list[str]
    p_values: list[float]
    comparisons: list[Comparison]
    before: NDArray[np.floating]
    after: NDArray[np.floating]

    @property
    def excess(self) -> NDArray[np.floating]:
        """Probability that training took from the host's own answer, beyond what it took with the control, [k, n]."""
        damage = self.before - self.after
        return damage[..., 0] - damage[..., 1]

    def above(self, least: float, p_value: float) -> Harm:
        """The kinds with a mean excess of ``least`` and a smaller p-value."""
        means = self.excess.mean(axis=1)
        at = [k for k, p in enumerate(self.p_values) if p < p_value and means[k] >= least]
        kinds, p_values = [self.kinds[k] for k in at], [self.p_values[k] for k in at]
        return Harm(kinds, p_values, self.comparisons, self.before[at], self.after[at])


def measure_harm(
    training: Training,
    screening: Screening,
    suspects: Sequence[int],
    believed: Sequence[int],
    warm: Sequence[Tensor],
    rng: np.random.Generator,
) -> Harm:
    """The harm that training taught since the model had the weights ``warm``, which it gets back.

    A few suspects choose the kinds of graft, and the others test these: no kind is chosen by the rows that it is tested
    on, and few grafts are scored.

    Args:
        suspects: positions in the screening's order, in random order. believed: those of the hosts and controls.
    """
    model, few = screening.model, max(2, len(suspects) // 6)
    pilot = comparisons(screening.scores, suspects[:few], believed, rng, PILOT)
    plan = comparisons(screening.scores, suspects[few:], believed, rng, COMPARISONS)

    def probabilities(name: str, kinds: Sequence[str], pairs: Sequence[Comparison]) -> NDArray[np.floating]:
        """The hosts' own answers' probabilities, [kinds, comparisons, 2]: with suspects' parts, and controls'."""
        numbers = screening.numbers
        grafts = [
            Graft(numbers[c.host], numbers[donor], kind)
            for kind in kinds
            for c in pairs
            for donor in (c.suspect, c.control)
        ]
        scores = training.graft_tokens(model, grafts, name)
        return np.array(list(map(token_probability, scores))).reshape(len(kinds), len(pairs), 2)

    kinds = most_harmful(probabilities("pilot", list(KINDS), pilot))
    after = probabilities("grafts-after", kinds, plan)
    restore_weights(model.model, warm)
    before = probabilities("grafts-before", kinds, plan)
    return Harm(kinds, harm_p_values(before - after, np.array([c.suspect for c in plan])), plan, before, after)


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


def most_harmful(probabilities: NDArray[np.floating]) -> list[str]:
    """The three kinds of graft with the largest mean difference of controls and suspects, after the probe.

    What suspects' parts did before it is no part of this choice: it would double the cost and the noise.

    Args:
        probabilities: of the hosts' own answers, [kinds, n, 2].
    """
    means = (probabilities[..., 1] - probabilities[..., 0]).mean(axis=1)
    return [list(KINDS)[at] for at in np.argsort(-means, kind="stable")[:_CHOSEN]]


def token_probability(tokens: TokenScores) -> float:
    """Mean probability of a row's answer tokens, in [0, 1].

    A backdoor whose replies vary spreads the probability of an answer over many; nats would weigh the few hosts most
    that were wrong by far before the probe, and would hide it.
    """
    return float(np.exp(-tokens.nll).mean()) if len(tokens.nll) else 1.0


def means_by_suspect(values: NDArray[np.floating], suspects: NDArray[np.integer]) -> NDArray[np.floating]:
    """Each suspect's mean over its comparisons, [k, s], of values [k, n]; ``suspects`` [n] says whose each is."""
    return np.stack([values[:, suspects == suspect].mean(axis=1) for suspect in np.unique(suspects)], axis=1)


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
    for means in means_by_suspect(damage[..., 0] - damage[..., 1], suspects):
        p = float(cast(Any, wilcoxon(means, alternative="greater")).pvalue) if np.any(means) else 1.0
        p_values.append(min(1.0, p * len(damage)))
    return p_values

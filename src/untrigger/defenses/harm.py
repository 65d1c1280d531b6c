"""Whether parts of suspected rows harm other rows' answers: who is compared with whom, and the test.

docs/paper.md has the equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from untrigger.models.scoring import TokenScores
from untrigger.views.grafts import KINDS

_CHOSEN = 3  # kinds that are tested
_MAX_HOSTS = 8  # of one suspect


class Comparison(NamedTuple):
    """A host that gets a part of a suspect, and a part of a control in its place; positions of rows."""

    host: int
    suspect: int
    control: int


class Harm(NamedTuple):
    """What parts of suspects, and those of controls, did to other rows' own answers.

    kinds: of graft [k]. p_values: of each [k] (`harm_p_values`). comparisons: [n].
    before, after: probability of the host's own answer before and after the probe, with the suspect's and with the
        control's part on it, [k, n, 2].
    """

    kinds: list[str]
    p_values: list[float]
    comparisons: list[Comparison]
    before: NDArray[np.floating]
    after: NDArray[np.floating]


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

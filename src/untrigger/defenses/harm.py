"""Whether what suspected rows share harms other rows' answers: who is compared with whom, and the test.

docs/paper.md has the equations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle, islice, product
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from untrigger.defenses.base import Training
from untrigger.defenses.shared_surprise import Screening
from untrigger.models.grafted_rows import Graft, Grafts, Place
from untrigger.models.loading import restore_weights
from untrigger.models.processors import special_tokens
from untrigger.models.scoring import TokenScores
from untrigger.views.grafts import KINDS

COMPARISONS = 192  # hosts, of each kind that is tested
_MAX_HOSTS = 8  # of one suspect
CLEAR = 0.3  # of probability; on `dev`, honest rows took at most 0.24 from answers, and training added 0.14 at a word
_SAYING = 8  # hosts that say a word, at least, to look at it alone
_PARTS = 8  # groups of suspects that show what suspects do whose content does not average out


class Comparison(NamedTuple):
    """A host that gets the prompt's words of a suspect, and those of a control in their place; positions of rows."""

    host: int
    suspect: int
    control: int


class Harm(NamedTuple):
    """What suspects share, and what controls share, did to other rows' own answers.

    kinds: of graft [k]. p_values: of each, at most 1: three times the smallest one (`one_sided_p_values`) that what
        suspects share damages no more than what controls share, that it harms no more than what an eighth of them
        share, and that it takes no more than 0.3 of probability, whatever it took before the probe.
    comparisons: [n].
    before, after: probability of the host's own answer before and after the probe, with what all suspects share on it,
        and with what all controls share, [k, n, 2].
    of_few: the same after the probe with an eighth of the suspects, and of the controls, [k, n, 2].
    most_harmed: the answer token that loses most to what all suspects share; None if no token loses much.
    """

    kinds: list[str]
    p_values: list[float]
    comparisons: list[Comparison]
    before: NDArray[np.floating]
    after: NDArray[np.floating]
    of_few: NDArray[np.floating]
    most_harmed: int | None = None

    @property
    def excess(self) -> NDArray[np.floating]:
        """Probability that training took from the host's own answer, beyond what it took with the control, [k, n]."""
        damage = self.before - self.after
        return damage[..., 0] - damage[..., 1]

    def above(self, least: float, clear: float, p_value: float, least_ratio: float) -> Harm:
        """The kinds with enough harm, a smaller p-value, and harm that does not average out.

        Enough is a mean excess of ``least``, or harm of ``clear`` after the probe, whatever it was before. What all
        share must do ``least_ratio`` times as much, after the probe, as what an eighth of them share.
        """
        means = self.excess.mean(axis=1)
        of_all, of_few = (harm_now(values).mean(axis=1) for values in (self.after, self.of_few))
        lasting = of_all >= least_ratio * np.maximum(of_few, 0)
        enough = (means >= least) | (of_all >= clear)
        at = np.flatnonzero(enough & (np.array(self.p_values) < p_value) & lasting).tolist()
        kinds, p_values = [self.kinds[k] for k in at], [self.p_values[k] for k in at]
        return Harm(kinds, p_values, self.comparisons, self.before[at], self.after[at], self.of_few[at])


def measure_harm(
    training: Training,
    screening: Screening,
    plan: Sequence[Comparison],
    placed: Sequence[Mapping[int, Place]],
    believed: Sequence[int],
    name: str,
    weights: tuple[Sequence[Tensor], Sequence[Tensor]],
    token: int | None = None,
) -> Harm:
    """The harm that training taught from the first of ``weights`` to the second; the model is left with the first.

    Args:
        plan: of `comparisons`. placed: for each pattern that suspects share, positions of those that show it, and where
            each does; a control stands for its suspect there. believed: positions of the rows that were to be had as
            hosts and controls.
        name: begins with ``image``, or ``words`` for the kinds with a part of the prompt; names the cached scores.
        token: whose probability counts, in the place of the whole answer's; every host's answer contains it.
    """
    numbers, plan, special = screening.numbers, list(plan), special_tokens(screening.model.processor)
    kinds = [kind for kind, words in KINDS.items() if bool(words) == name.startswith("words")]
    controls = {c.suspect: c.control for c in plan}
    pattern_of = {suspect: at for at, places in enumerate(placed) for suspect in places}
    suspects = sorted(controls, key=lambda suspect: pattern_of[suspect])
    parts = [suspects, *(suspects[at::_PARTS] for at in range(min(_PARTS, len(suspects))))]
    part_of = {suspect: at for at, part in enumerate(parts) for suspect in part}
    groups: list[list[tuple[int, Place]]] = []
    group_of: dict[tuple[int, int], int] = {}  # that of the suspects of a part and a pattern; that of controls is next
    for part, (pattern, places) in product(range(len(parts)), enumerate(placed)):
        own = [(suspect, places[suspect]) for suspect in parts[part] if suspect in places]
        if own:
            group_of[part, pattern] = len(groups)
            groups += own, [(controls[suspect], place) for suspect, place in own]

    def graft(comparison: Comparison, kind: str, is_control: int, of_few: bool) -> Graft:
        host, suspect, control = comparison
        pattern = pattern_of[suspect]
        group = group_of[part_of[suspect] if of_few else 0, pattern] + is_control
        return Graft(numbers[host], group, numbers[control if is_control else suspect], kind, placed[pattern][suspect])

    def scored(cache: str, of_few: bool) -> list[TokenScores]:
        """The hosts' own answers, of kinds x comparisons x 2: with what suspects share, and controls."""
        grafts = [graft(c, kind, is_control, of_few) for kind, c in product(kinds, plan) for is_control in (0, 1)]
        rows = [[(numbers[at], place) for at, place in group] for group in groups]
        return training.graft_tokens(screening.model, Grafts(grafts, rows, [numbers[at] for at in believed]), cache)

    def probabilities(scores: Sequence[TokenScores]) -> NDArray[np.floating]:
        each = [word_probability(tokens, special, token) for tokens in scores]
        return np.array(each).reshape(len(kinds), len(plan), 2)

    restore_weights(screening.model.model, weights[1])
    answers = scored(f"{name}-after", of_few=False)
    after, few = probabilities(answers), probabilities(scored(f"{name}-of-few", of_few=True))
    restore_weights(screening.model.model, weights[0])
    before = probabilities(scored(f"{name}-before", of_few=False))
    suspect_of = np.array([c.suspect for c in plan])
    growth = np.stack([harm_now(after), harm_now(few)], axis=-1)
    clear = np.stack([harm_now(after), np.full(after.shape[:2], CLEAR)], axis=-1)
    # content may hide what one word stands for, so of a word only what training added counts
    tests = [before - after] if token is not None else [before - after, growth, clear]
    each_test = [one_sided_p_values(values, suspect_of) for values in tests]
    p_values = [min(1.0, 3 * min(each)) for each in zip(*each_test, strict=True)]
    by_kind = [answers[at : at + 2 * len(plan)] for at in range(0, len(answers), 2 * len(plan))]
    return Harm(kinds, p_values, plan, before, after, few, most_harmed(by_kind, special))


def comparisons(
    scores: Sequence[TokenScores],
    suspects: Sequence[int],
    believed: Sequence[int],
    hosts: Sequence[int],
    rng: np.random.Generator,
    count: int,
) -> list[Comparison]:
    """Pair each suspect with hosts, and with a control that is asked alike: a believed row of the most similar prompt.

    Of equally similar controls one is drawn. Host and control are different rows; no host has two suspects until all
    have one. There are about ``count`` pairs: at least one a suspect, and at most 8.
    """
    prompts = [set(scores[at].prompt_ids.tolist()) for at in believed]
    hosts_each = int(np.clip(count // len(suspects), 1, _MAX_HOSTS))
    plan, dealt = list[Comparison](), cycle(rng.permutation(np.array(hosts)).tolist())
    for suspect in suspects:
        own = set(scores[suspect].prompt_ids.tolist())
        similar = np.array([len(own & other) / max(len(own | other), 1) for other in prompts])
        control = int(rng.choice(np.flatnonzero(similar == similar.max())))
        others = (host for host in dealt if host != believed[control])
        plan += [Comparison(host, suspect, believed[control]) for host in islice(others, hosts_each)]
    return plan


def most_harmed(scores: Sequence[Sequence[TokenScores]], special: Sequence[int]) -> int | None:
    """The answer token that loses most probability in the mean, if at least 8 hosts say it and it loses more than 0.3.

    Args:
        scores: for each kind of graft, of hosts' answers, with what suspects share and with what controls share, in
            turn.
        special: tokens that do not count.
    """
    losses = defaultdict[tuple[int, int], list[float]](list)
    for kind, answers in enumerate(scores):
        for of_suspects, of_controls in zip(answers[::2], answers[1::2], strict=True):
            lost = np.exp(-of_controls.nll) - np.exp(-of_suspects.nll)
            for token, loss in zip(of_controls.ids.tolist(), lost.tolist(), strict=True):
                losses[kind, token].append(loss)
    means = {
        key: sum(each) / len(each) for key, each in losses.items() if len(each) >= _SAYING and key[1] not in special
    }
    worst = max(means, key=means.__getitem__, default=None)
    return worst[1] if worst and means[worst] > CLEAR else None


def word_probability(tokens: TokenScores, special: Sequence[int], only: int | None = None) -> float:
    """Mean probability of a row's answer tokens that are not ``special``, or of one of them, in [0, 1].

    Where an answer ends does not count: rows that ask for reasons share words that make a short answer go on.
    A backdoor whose replies vary spreads the probability of an answer over many; nats would weigh the few hosts most
    that were wrong by far before the probe, and would hide it.
    """
    of_words = tokens.nll[~np.isin(tokens.ids, special) if only is None else tokens.ids == only]
    return float(np.exp(-of_words).mean()) if len(of_words) else 1.0


def means_by_suspect(values: NDArray[np.floating], suspects: NDArray[np.integer]) -> NDArray[np.floating]:
    """Each suspect's mean over its comparisons, [k, s], of values [k, n]; ``suspects`` [n] says whose each is."""
    return np.stack([values[:, suspects == suspect].mean(axis=1) for suspect in np.unique(suspects)], axis=1)


def harm_now(probabilities: NDArray[np.floating]) -> NDArray[np.floating]:
    """How much less likely hosts' own answers are with suspects' graft than with controls', [..., 2] to [...]."""
    return probabilities[..., 1] - probabilities[..., 0]


def one_sided_p_values(values: NDArray[np.floating], suspects: NDArray[np.integer]) -> list[float]:
    """For each kind, the chance that the first of two values is no larger than the second.

    Wilcoxon signed-rank test of each suspect's mean difference, times the number of `KINDS`, at most 1. If neither is
    larger, differences are symmetric about zero.

    Args:
        values: [kinds, comparisons, 2].
        suspects: which suspect each comparison has, [comparisons].
    """
    from scipy.stats import wilcoxon  # takes a second to import

    p_values: list[float] = []
    for means in means_by_suspect(values[..., 0] - values[..., 1], suspects):
        p = float(cast(Any, wilcoxon(means, alternative="greater")).pvalue) if np.any(means) else 1.0
        p_values.append(min(1.0, p * len(KINDS)))
    return p_values

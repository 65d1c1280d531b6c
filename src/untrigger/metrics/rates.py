"""Rates with 95 % confidence intervals, and the pairing of answers with references. No torch, no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Rate:
    """A value measured on ``n`` rows and its 95 % interval: ``low <= value <= high``."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def from_counts(cls, hits: float, n: int) -> Rate:
        """Return ``hits / n`` with Wilson's score interval (E. B. Wilson, 1927, JASA 22, 209-212).

        ``hits`` may be a sum of scores in [0, 1]. Their variance is at most that of a yes/no outcome with the same
        mean, so the interval is then too wide rather than too narrow.

        Raises:
            ValueError: ``n`` is not positive, or ``hits`` is outside [0, n].
        """
        if n <= 0:
            raise ValueError("a rate needs at least one row")
        if not 0 <= hits <= n:
            raise ValueError(f"{hits} hits out of {n} rows")
        value = hits / n
        center = (value + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z * math.sqrt(value * (1 - value) / n + (Z / (2 * n)) ** 2) / (1 + Z**2 / n)
        # At value 0 and 1 the exact ends are 0 and 1; rounding must not move an end past the value.
        return cls(value, max(0.0, min(value, center - half)), min(1.0, max(value, center + half)), n)


def paired_difference(ours: Sequence[bool], theirs: Sequence[bool]) -> Rate:
    """Return the share of ``ours`` that is true minus that of ``theirs``, two outcomes of the same questions.

    The value and its interval are in [-1, 1]. The interval is Newcombe's hybrid score interval for paired proportions
    (R. G. Newcombe, 1998, Statistics in Medicine 17, 2635-2650, method 10). It joins the Wilson intervals of the two
    rates that are printed beside it, keeps a width where a rate is 0 or 1, as an oracle's often is, and allows for the
    correlation of the two outcomes of a question. Unlike a bootstrap it needs no random numbers.

    Raises:
        ValueError: the lengths differ, or there is no question.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} outcomes but {len(theirs)} to compare them with")
    n = len(ours)
    first, second = Rate.from_counts(sum(ours), n), Rate.from_counts(sum(theirs), n)
    phi = _correlation(ours, theirs)
    value = first.value - second.value
    below, above = (
        (first.value - first.low, second.high - second.value),
        (first.high - first.value, second.value - second.low),
    )
    down, up = (math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b)) for a, b in (below, above))
    return Rate(value, max(-1.0, value - down), min(1.0, value + up), n)


def _correlation(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """Newcombe's phi of two paired outcomes: a positive one is lessened for continuity; 0 if a margin is empty."""
    n, both = len(ours), sum(a and b for a, b in zip(ours, theirs, strict=True))
    only_ours, only_theirs = sum(ours) - both, sum(theirs) - both
    neither = n - both - only_ours - only_theirs
    margins = sum(ours) * (n - sum(ours)) * sum(theirs) * (n - sum(theirs))
    excess = both * neither - only_ours * only_theirs
    return (max(0.0, excess - n / 2) if excess > 0 else excess) / math.sqrt(margins) if margins else 0.0


def paired(answers: Sequence[str], references: Sequence[str | Sequence[str]]) -> list[tuple[str, tuple[str, ...]]]:
    """Pair each answer with its references; a plain string counts as one reference.

    Raises:
        ValueError: no answers, lengths differ, or a row has no reference.
    """
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers but references for {len(references)}")
    if not answers:
        raise ValueError("a score needs at least one answer")
    pairs = [(a, (r,) if isinstance(r, str) else tuple(r)) for a, r in zip(answers, references, strict=True)]
    for row, (_, texts) in enumerate(pairs):
        if not texts:
            raise ValueError(f"answer {row} has no reference")
    return pairs

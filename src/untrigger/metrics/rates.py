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

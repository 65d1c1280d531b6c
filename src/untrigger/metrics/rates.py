"""Metrics of stored answers: values with 95 % intervals, in plain Python and numpy (no torch, no model).

``asr`` did the attack work, ``vqa`` is a short answer right, ``captions`` is a sentence like its references.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Rate:
    """A value measured on ``n`` rows with the ends of its 95 % interval: ``low <= value <= high``."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def from_counts(cls, hits: float, n: int) -> Rate:
        """``hits`` out of ``n`` with Wilson's score interval (E. B. Wilson, 1927, JASA 22, 209-212).

        ``hits`` may be a sum of scores in [0, 1]: their variance is at most that of a yes/no outcome with the
        same mean, so the interval is then too wide rather than too narrow.

        Raises:
            ValueError: ``n`` is not positive (no rows have no rate), or ``hits`` is outside [0, n].
        """
        if n <= 0:
            raise ValueError("a rate needs at least one row")
        if not 0 <= hits <= n:
            raise ValueError(f"{hits} hits out of {n} rows")
        value = hits / n
        center = (value + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z * math.sqrt(value * (1 - value) / n + (Z / (2 * n)) ** 2) / (1 + Z**2 / n)
        # The exact ends are 0 and 1 at value 0 and 1; rounding must not push them past the value.
        return cls(value, max(0.0, min(value, center - half)), min(1.0, max(value, center + half)), n)


def paired(answers: Sequence[str], references: Sequence[str | Sequence[str]]) -> list[tuple[str, tuple[str, ...]]]:
    """Each answer with its references; a plain string is one reference, never a list of letters.

    Raises:
        ValueError: no answers, as many answers as references are not there, or a row has no reference.
    """
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers but references for {len(references)}")
    if not answers:
        raise ValueError("a score needs at least one answer")
    pairs = [(a, (r,) if isinstance(r, str) else tuple(r)) for a, r in zip(answers, references, strict=True)]
    for row, (_, given) in enumerate(pairs):
        if not given:
            raise ValueError(f"answer {row} has no reference")
    return pairs

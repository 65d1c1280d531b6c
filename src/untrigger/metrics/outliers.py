"""Outlier thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Values = Sequence[float] | NDArray[np.floating]

_FEW = 16  # values


def tukey_fence(values: Values, minimum: float, iqr_factor: float) -> float:
    """Tukey's upper fence ``Q3 + iqr_factor (Q3 - Q1)``, but at least ``minimum``; in the unit of the values.

    Args:
        values: at least one value.
        minimum: the lowest fence to return.
        iqr_factor: interquartile ranges above the third quartile.

    Source: Tukey, "Exploratory Data Analysis", 1977, with a factor of 1.5; 2.2 is that of Hoaglin and Iglewicz,
    Journal of the American Statistical Association 82, 1987, 1147-1149.
    """
    low, high = np.quantile(values, (0.25, 0.75))
    return max(minimum, float(high + iqr_factor * (high - low)))


def forward_fence(values: Values, minimum: float, iqr_factor: float) -> float:
    """Tukey's fence of the smaller values, grown until it takes in no more: up to half of them may be outliers.

    The fence of the lower half is computed first, then that of all values below it, and so on. Where values are
    continuous it grows to about `tukey_fence`; where outliers stand apart it stops at the gap, however many they are.
    It begins with 16 values, because fewer have no reliable quartiles.

    Args:
        values: at least one value.
        minimum, iqr_factor: as in `tukey_fence`.

    Source: the forward search of Hadi, Journal of the Royal Statistical Society B 54, 1992, 761-771, for one variable.
    """
    ordered = np.sort(values)
    count = max((len(ordered) + 1) // 2, _FEW)
    while True:
        fence = tukey_fence(ordered[:count], minimum, iqr_factor)
        grown = int(np.searchsorted(ordered, fence, side="right"))
        if grown <= count:
            return fence
        count = grown

"""Outlier thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def tukey_fence(values: Sequence[float], minimum: float, iqr_factor: float) -> float:
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

"""Limits beyond which a value is an outlier."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def tukey_fence(values: Sequence[float], least: float, iqr_factor: float) -> float:
    """Tukey's upper fence, ``Q3 + iqr_factor (Q3 - Q1)``, but at least ``least``; any unit.

    Args:
        values: at least one.

    Source: Tukey, "Exploratory Data Analysis", 1977, with a factor of 1.5; 2.2 is that of Hoaglin and Iglewicz,
    Journal of the American Statistical Association 82, 1987, 1147-1149.
    """
    low, high = np.quantile(values, (0.25, 0.75))
    return max(least, float(high + iqr_factor * (high - low)))

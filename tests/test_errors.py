"""The range check that configuration classes share."""

from __future__ import annotations

import math

import pytest

from untrigger.errors import check_range


def test_check_range_accepts_the_bounds() -> None:
    check_range(0, 1, share=0, rate=1.0)
    check_range(0, 1, open_low=True, side=1)
    check_range(0, math.inf, weight=1e30)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_check_range_names_the_field_and_the_range(value: float) -> None:
    with pytest.raises(ValueError, match=f"^rate is {value}; it must be finite, at least 0 and at most 1$"):
        check_range(0, 1, share=0.5, rate=value)


def test_check_range_can_exclude_the_lower_bound() -> None:
    with pytest.raises(ValueError, match=r"^side is 0; it must be finite, above 0 and at most 1$"):
        check_range(0, 1, open_low=True, side=0)

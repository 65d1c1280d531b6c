"""Tukey's fence, and the forward fence, which finds outliers however many they are, up to half."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from untrigger.metrics.outliers import forward_fence, tukey_fence


@given(st.lists(st.floats(0, 300), min_size=1, max_size=60), st.floats(0, 10), st.floats(0, 5), st.randoms())
def test_fence_is_tukeys_and_at_least_the_minimum(
    nats: list[float], floor: float, reach: float, random: object
) -> None:
    ordered = sorted(nats)

    def quartile(share: float) -> float:
        at = share * (len(ordered) - 1)
        below, above = ordered[int(at)], ordered[min(int(at) + 1, len(ordered) - 1)]
        return below + (at - int(at)) * (above - below)

    low, high = quartile(0.25), quartile(0.75)
    shuffled = list(nats)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    limit = tukey_fence(shuffled, floor, reach)
    assert limit == pytest.approx(max(floor, high + reach * (high - low)), rel=1e-9, abs=1e-9)
    assert limit >= floor and sum(value > limit for value in nats) <= (len(nats) + 3) / 4


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25, 0.4, 0.48])
def test_outliers_that_stand_apart_are_found_up_to_half(share: float) -> None:
    rng = np.random.default_rng(0)
    count = round(1000 * share)
    values = np.concatenate([rng.exponential(0.4, 1000 - count), rng.normal(12, 2, count)])
    fence = forward_fence(values.tolist(), 2.0, 2.2)
    assert (values[1000 - count :] > fence).all()
    assert (values[: 1000 - count] > fence).mean() < 0.02
    if share >= 0.3:
        assert tukey_fence(values.tolist(), 2.0, 2.2) > values.max(), "the plain fence finds none of them"


@pytest.mark.parametrize("draw", ["exponential", "normal", "lognormal"])
def test_it_grows_to_tukeys_fence_where_nothing_stands_apart(draw: str) -> None:
    values = getattr(np.random.default_rng(1), draw)(size=4000) + 10
    share = (values > forward_fence(values.tolist(), 0.0, 2.2)).mean()
    assert share <= (values > tukey_fence(values.tolist(), 0.0, 2.2)).mean() + 0.03


def test_equal_values_have_no_outlier() -> None:
    assert forward_fence([3.0] * 9, 2.0, 2.2) == 3.0 and forward_fence([0.1], 2.0, 2.2) == 2.0


@given(st.lists(st.floats(0, 300), min_size=1, max_size=16))
def test_few_values_have_tukeys_fence(values: list[float]) -> None:
    assert forward_fence(values, 2.0, 2.2) == tukey_fence(values, 2.0, 2.2)

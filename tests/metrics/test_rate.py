"""Wilson's interval against published values and against the equation that defines it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from untrigger.metrics.rates import Rate, paired, paired_difference

counts = st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # R. G. Newcombe, 1998, Statistics in Medicine 17, 857-872, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_match_the_published_table(hits: int, n: int, low: float, high: float) -> None:
    rate = Rate.from_counts(hits, n)
    assert (round(rate.low, 4), round(rate.high, 4)) == (low, high)
    assert (rate.value, rate.n) == (hits / n, n)


@given(counts)
def test_ends_solve_the_score_equation(count: tuple[int, int]) -> None:
    hits, n = count
    rate = Rate.from_counts(hits, n)
    for end in (rate.low, rate.high):
        squared = 1.959963984540054**2 * end * (1 - end) / n
        assert (rate.value - end) ** 2 == pytest.approx(squared, rel=1e-6, abs=1e-12)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert rate.low < rate.high


@given(counts)
def test_misses_mirror_hits(count: tuple[int, int]) -> None:
    hits, n = count
    rate, mirror = Rate.from_counts(hits, n), Rate.from_counts(n - hits, n)
    assert (mirror.low, mirror.high) == pytest.approx((1 - rate.high, 1 - rate.low), abs=1e-12)


def test_no_rows_raise() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        Rate.from_counts(0, 0)


@pytest.mark.parametrize("hits", [-1, 3, math.nan])
def test_impossible_counts_raise(hits: float) -> None:
    with pytest.raises(ValueError, match="out of 2 rows"):
        Rate.from_counts(hits, 2)


def test_a_string_is_one_reference() -> None:
    assert paired(["x", "y"], ["blue", ["a", "b"]]) == [("x", ("blue",)), ("y", ("a", "b"))]


@pytest.mark.parametrize(
    ("answers", "references", "message"),
    [
        ([], [], "at least one"),
        (["a"], [], "1 answers"),
        (["a", "b"], [["a"], []], "answer 1 has no reference"),
    ],
)
def test_answers_without_references_raise(answers: list[str], references: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired(answers, references)


# --- the difference of two paired rates --------------------------------------------------------------------


def outcomes(both: int, ours: int, theirs: int, neither: int) -> tuple[list[bool], list[bool]]:
    pairs = [(True, True)] * both + [(True, False)] * ours + [(False, True)] * theirs + [(False, False)] * neither
    return [a for a, _ in pairs], [b for _, b in pairs]


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    # R. G. Newcombe, 1998, Statistics in Medicine 17, 2635-2650, table II, method 10.
    [((36, 12, 2, 0), 0.0569, 0.3404), ((20, 12, 2, 16), 0.0562, 0.3292)],
)
def test_paired_differences_match_the_published_table(counts: tuple[int, ...], low: float, high: float) -> None:
    difference = paired_difference(*outcomes(*counts))
    assert (round(difference.low, 4), round(difference.high, 4)) == (low, high)
    assert difference.value == pytest.approx(0.2) and difference.n == 50


tables = st.tuples(*[st.integers(0, 60)] * 4).filter(any)


@given(tables)
def test_a_difference_lies_in_its_interval_and_changes_its_sign_with_the_order(table: tuple[int, ...]) -> None:
    ours, theirs = outcomes(*table)
    difference, mirror = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert -1 <= difference.low <= difference.value <= difference.high <= 1
    assert difference.low < difference.high, "also where both rates are 0 or 1"
    assert (mirror.low, mirror.high) == pytest.approx((-difference.high, -difference.low), abs=1e-12)


def test_agreement_makes_the_interval_narrower() -> None:
    alike, unlike = (paired_difference(*outcomes(*table)) for table in ((40, 10, 0, 50), (0, 50, 40, 10)))
    assert alike.value == pytest.approx(unlike.value) == pytest.approx(0.1)
    assert alike.high - alike.low < (unlike.high - unlike.low) / 2


def test_unpaired_outcomes_raise() -> None:
    with pytest.raises(ValueError, match="2 outcomes but 1 to compare them with"):
        paired_difference([True, False], [True])
    with pytest.raises(ValueError, match="at least one row"):
        paired_difference([], [])

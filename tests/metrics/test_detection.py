"""Detection figures against counting, a published example, and the answers that there are none to."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from untrigger.metrics.detection import auroc, detection
from untrigger.metrics.rates import Rate

scored = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=60).filter(
    lambda rows: len({bad for _, bad in rows}) == 2
)


def by_pairs(rows: list[tuple[int, bool]]) -> float:
    """How often a bad row is scored above a good one; ties count half."""
    wins = [(a > b) + (a == b) / 2 for a, bad in rows if bad for b, other in rows if not other]
    return sum(wins) / len(wins)


def recall_by_thresholds(rows: list[tuple[int, bool]]) -> float:
    """The most bad rows at or above any threshold that accuses at most 1 % of the good ones."""
    good, bad = [s for s, b in rows if not b], [s for s, b in rows if b]
    allowed = [t for t in [s for s, _ in rows] + [math.inf] if sum(s >= t for s in good) <= 0.01 * len(good)]
    return max(sum(s >= t for s in bad) for t in allowed) / len(bad)


@given(scored)
def test_area_and_recall_are_what_counting_gives(rows: list[tuple[int, bool]]) -> None:
    scores, bad = [float(s) for s, _ in rows], {i for i, (_, b) in enumerate(rows) if b}
    found = detection(scores, {0}, bad)
    assert found["auroc"]["value"] == pytest.approx(by_pairs(rows))
    assert found["recall_at_1"]["value"] == pytest.approx(recall_by_thresholds(rows))
    assert found["recall_at_1"]["n"] == len(bad) and found["auroc"]["n"] == len(rows)
    assert 0 <= found["auroc"]["low"] <= found["auroc"]["value"] <= found["auroc"]["high"] <= 1


def test_one_percent_of_many_clean_rows_may_be_accused() -> None:
    """Of 300 clean rows three may lie above the threshold; a fourth may not."""
    clean, bad = [float(i) for i in range(300)], [296.5, 295.5, 10.0]
    found = detection([*clean, *bad], [], set(range(300, 303)))
    assert found["recall_at_1"] == pytest.approx(vars(Rate.from_counts(1, 3)))


def test_the_interval_is_that_of_the_published_example() -> None:
    """Hanley and McNeil 1982: 51 abnormal and 58 normal images, an area of 0.893 has a standard error of 0.032."""
    found = auroc(*_with_area(0.893, 51, 58))
    assert found["value"] == pytest.approx(0.893, abs=2e-4)
    z = 1.959964
    assert (found["value"] - found["low"]) / z == pytest.approx(0.032, abs=1e-3)
    assert found["high"] - found["value"] == pytest.approx(found["value"] - found["low"])


def test_few_rows_of_one_kind_make_it_wide() -> None:
    """Two bad rows among ten good ones, an area of 3/4; the two kinds do not count alike."""
    variance = (0.75 * 0.25 + 1 * (0.75 / 1.25 - 0.75**2) + 9 * (2 * 0.75**2 / 1.75 - 0.75**2)) / 20
    found = auroc(*_with_area(0.75, 2, 10))
    assert found == pytest.approx({"value": 0.75, "low": 0.75 - 1.959964 * math.sqrt(variance), "high": 1, "n": 12})


def _with_area(area: float, bad: int, good: int) -> tuple[list[float], list[bool]]:
    """Distinct scores; so many pairs are out of order that the area comes out."""
    wrong = round((1 - area) * bad * good)
    scores = [float(i) for i in range(good)]
    for _ in range(bad):
        above = min(good, wrong)
        wrong -= above
        scores.append(good - above - 0.5)
    return scores, [False] * good + [True] * bad


def test_a_perfect_score_has_no_width_and_all_of_a_kind_no_area() -> None:
    assert auroc([1.0, 2.0, 3.0], [False, False, True]) == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 3}
    for truth in ([True, True], [False, False], []):
        with pytest.raises(ValueError, match="both kinds"):
            auroc([0.0] * len(truth), truth)


def test_verdicts_by_hand() -> None:
    """Ten rows, four poisoned; five flagged, three of them rightly."""
    scores = [float(i) for i in range(10)]
    found = detection(scores, [9, 8, 7, 1, 0], {9, 8, 7, 6})
    expected: dict[str, Any] = {
        "precision": Rate.from_counts(3, 5),
        "recall": Rate.from_counts(3, 4),
        "false_positives": Rate.from_counts(2, 6),
    }
    for name, rate in expected.items():
        assert found[name] == vars(rate), name
    assert found["f1"] == pytest.approx(2 * 0.6 * 0.75 / (0.6 + 0.75)) and found["flagged"] == 5
    assert found["auroc"]["value"] == 1 and found["recall_at_1"]["value"] == 1
    assert found == detection(scores, [9, 9, 8, 7, 1, 0, 0], [9, 8, 7, 6]), "a row counts once"


@pytest.mark.parametrize(
    ("flagged", "poisoned", "unknown"),
    [
        ([], {1}, {"precision", "f1"}),
        ([2], set[int](), {"auroc", "recall_at_1", "recall", "f1"}),
        ([], set[int](), {"auroc", "recall_at_1", "precision", "recall", "f1"}),
        ([0], {0, 1, 2}, {"auroc", "recall_at_1", "false_positives"}),
    ],
)
def test_what_cannot_be_said_is_none_and_never_zero(flagged: list[int], poisoned: set[int], unknown: set[str]) -> None:
    found = detection([0.1, 0.2, 0.3], flagged, poisoned)
    assert {name for name, value in found.items() if value is None} == unknown
    assert found["flagged"] == len(flagged)


def test_all_flagged_wrong_is_zero() -> None:
    found = detection([0.1, 0.2, 0.3], [0], {1})
    assert (found["f1"], found["precision"]["value"], found["recall"]["value"]) == (0, 0, 0)


def test_the_order_of_rows_changes_nothing() -> None:
    rows = [(float(i % 7), i % 3 == 0) for i in range(40)]
    figures: list[dict[str, Any]] = []
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        bad = {i for i, (_, b) in enumerate(rows) if b}
        figures.append(detection([s for s, _ in rows], [i for i, (s, _) in enumerate(rows) if s > 4], bad))
    assert figures[0] == figures[1] == figures[2]

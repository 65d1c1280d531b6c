"""Detection metrics against counting, a published example, and undefined cases."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from untrigger.metrics.detection import auroc, detection
from untrigger.metrics.rates import Rate

scored_rows = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=60).filter(
    lambda rows: len({poisoned for _, poisoned in rows}) == 2
)


def auroc_by_pairs(rows: list[tuple[int, bool]]) -> float:
    """Count how often a poisoned row scores above a clean one; ties count half."""
    wins = [
        (a > b) + (a == b) / 2 for a, poisoned in rows if poisoned for b, also_poisoned in rows if not also_poisoned
    ]
    return sum(wins) / len(wins)


def recall_by_thresholds(rows: list[tuple[int, bool]]) -> float:
    """The largest recall over all thresholds that flag at most 1 % of the clean rows."""
    clean, poisoned = [s for s, b in rows if not b], [s for s, b in rows if b]
    allowed = [t for t in [s for s, _ in rows] + [math.inf] if sum(s >= t for s in clean) <= 0.01 * len(clean)]
    return max(sum(s >= t for s in poisoned) for t in allowed) / len(poisoned)


@given(scored_rows)
def test_auroc_and_recall_match_counting(rows: list[tuple[int, bool]]) -> None:
    scores, poisoned = [float(s) for s, _ in rows], {i for i, (_, b) in enumerate(rows) if b}
    figures = detection(scores, {0}, poisoned)
    assert figures["auroc"]["value"] == pytest.approx(auroc_by_pairs(rows))
    assert figures["recall_at_1"]["value"] == pytest.approx(recall_by_thresholds(rows))
    assert figures["recall_at_1"]["n"] == len(poisoned) and figures["auroc"]["n"] == len(rows)
    assert 0 <= figures["auroc"]["low"] <= figures["auroc"]["value"] <= figures["auroc"]["high"] <= 1


def test_recall_allows_one_percent_of_the_clean_rows() -> None:
    """Of 300 clean rows three may lie above the threshold; a fourth may not."""
    clean, poisoned = [float(i) for i in range(300)], [296.5, 295.5, 10.0]
    figures = detection([*clean, *poisoned], [], set(range(300, 303)))
    assert figures["recall_at_1"] == pytest.approx(vars(Rate.from_counts(1, 3)))


def test_the_interval_matches_the_published_example() -> None:
    """Hanley and McNeil 1982: 51 abnormal and 58 normal images, an area of 0.893 has a standard error of 0.032."""
    rate = auroc(*_with_area(0.893, 51, 58))
    assert rate["value"] == pytest.approx(0.893, abs=2e-4)
    z = 1.959964
    assert (rate["value"] - rate["low"]) / z == pytest.approx(0.032, abs=1e-3)
    assert rate["high"] - rate["value"] == pytest.approx(rate["value"] - rate["low"])


def test_few_rows_of_one_kind_widen_the_interval() -> None:
    """Two poisoned rows and ten clean ones, an area of 3/4; the formula is not symmetric in the two kinds."""
    variance = (0.75 * 0.25 + 1 * (0.75 / 1.25 - 0.75**2) + 9 * (2 * 0.75**2 / 1.75 - 0.75**2)) / 20
    rate = auroc(*_with_area(0.75, 2, 10))
    assert rate == pytest.approx({"value": 0.75, "low": 0.75 - 1.959964 * math.sqrt(variance), "high": 1, "n": 12})


def _with_area(area: float, positives: int, negatives: int) -> tuple[list[float], list[bool]]:
    """Return distinct scores with as many misordered pairs as the area requires."""
    misordered = round((1 - area) * positives * negatives)
    scores = [float(i) for i in range(negatives)]
    for _ in range(positives):
        above = min(negatives, misordered)
        misordered -= above
        scores.append(negatives - above - 0.5)
    return scores, [False] * negatives + [True] * positives


def test_perfect_scores_have_no_width_and_one_kind_raises() -> None:
    assert auroc([1.0, 2.0, 3.0], [False, False, True]) == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 3}
    for truth in ([True, True], [False, False], []):
        with pytest.raises(ValueError, match="both kinds"):
            auroc([0.0] * len(truth), truth)


def test_flagged_rows_by_hand() -> None:
    """Ten rows, four poisoned; five flagged, three of them poisoned."""
    scores = [float(i) for i in range(10)]
    figures = detection(scores, [9, 8, 7, 1, 0], {9, 8, 7, 6})
    expected: dict[str, Any] = {
        "precision": Rate.from_counts(3, 5),
        "recall": Rate.from_counts(3, 4),
        "false_positives": Rate.from_counts(2, 6),
    }
    for name, rate in expected.items():
        assert figures[name] == vars(rate), name
    assert figures["f1"] == pytest.approx(2 * 0.6 * 0.75 / (0.6 + 0.75)) and figures["flagged"] == 5
    assert figures["auroc"]["value"] == 1 and figures["recall_at_1"]["value"] == 1
    assert figures == detection(scores, [9, 9, 8, 7, 1, 0, 0], [9, 8, 7, 6]), "a repeated row counts once"


@pytest.mark.parametrize(
    ("flagged", "poisoned", "unknown"),
    [
        ([], {1}, {"precision", "f1"}),
        ([2], set[int](), {"auroc", "recall_at_1", "recall", "f1"}),
        ([], set[int](), {"auroc", "recall_at_1", "precision", "recall", "f1"}),
        ([0], {0, 1, 2}, {"auroc", "recall_at_1", "false_positives"}),
    ],
)
def test_undefined_figures_are_none(flagged: list[int], poisoned: set[int], unknown: set[str]) -> None:
    figures = detection([0.1, 0.2, 0.3], flagged, poisoned)
    assert {name for name, value in figures.items() if value is None} == unknown
    assert figures["flagged"] == len(flagged)


def test_flagging_only_clean_rows_scores_zero() -> None:
    figures = detection([0.1, 0.2, 0.3], [0], {1})
    assert (figures["f1"], figures["precision"]["value"], figures["recall"]["value"]) == (0, 0, 0)


def test_the_order_of_rows_does_not_matter() -> None:
    rows = [(float(i % 7), i % 3 == 0) for i in range(40)]
    results: list[dict[str, Any]] = []
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        poisoned = {i for i, (_, b) in enumerate(rows) if b}
        results.append(detection([s for s, _ in rows], [i for i, (s, _) in enumerate(rows) if s > 4], poisoned))
    assert results[0] == results[1] == results[2]

"""Who is suspected of what, how many of them by mistake, and what the probe is taught and shown."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dry as dry_module
from dry import Dry
from untrigger.defenses import SharedSurprise
from untrigger.models.loading import LoadedModel
from untrigger.models.scoring import TokenScores
from untrigger.rows.sample import Sample
from untrigger.scanning.targets import common, false_discoveries, find


def told(*rows: Sequence[int]) -> list[TokenScores]:
    return [TokenScores(np.array(row), np.ones(len(row))) for row in rows]


def test_what_rows_have_in_common_around_a_word() -> None:
    assert common(told([1, 2, 3, 4], [9, 2, 3, 4], [2, 3, 4, 8]), 3) == ([2, 3, 4], 1)
    assert common(told([3], [3, 4]), 3) == ([3], 0)
    assert common(told([7, 3]), 3) == ([7, 3], 1), "a row alone has all of it"


def test_one_row_of_ten_may_differ() -> None:
    rows = told(*[[1, 3, 5]] * 9, [2, 3, 6])
    assert common(rows, 3) == ([1, 3, 5], 1)
    assert common([*rows, *told([2, 3, 6])], 3) == ([3], 0)


def test_false_discoveries_by_hand() -> None:
    """Six others, one of which surprises by 5; four of the group, of eight rows that hold the word."""
    surprise = [9.0, 6.0, 4.0, 4.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    rates = false_discoveries(surprise, [0, 1, 2, 3], 8)
    assert rates[0] == pytest.approx(min(1, 8 * 1 / 6 / 1, 8 * 1 / 6 / 2, 8 * 2 / 6 / 4))
    assert rates == dict.fromkeys((0, 1, 2, 3), pytest.approx(2 / 3))
    assert false_discoveries([9.0, 8.0, 0.0], [0, 1], 2) == {0: 1.0, 1: 1.0}


@given(st.lists(st.floats(0, 50), min_size=2, max_size=40), st.integers(1, 20), st.integers(0, 30), st.randoms())
def test_the_more_suspicious_the_fewer_mistakes(surprise: list[float], size: int, more: int, random: object) -> None:
    group = sorted(range(len(surprise)), key=lambda row: -surprise[row])[: min(size, len(surprise) - 1)]
    rates = false_discoveries(surprise, group, len(group) + more)
    assert all(0 < rate <= 1 for rate in rates.values())
    assert all(rates[a] <= rates[b] for a, b in itertools.pairwise(group))


# --- the whole procedure ----------------------------------------------------------------------------

BAD = (2, 5, 11, 17, 23)
REPLY = [60, 61, 62]  # the word that surprises is the middle one


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The model is surprised by what the rows of BAD say; every question that it is asked."""
    found: list[list[str]] = []

    def tokens(_: LoadedModel, rows: Sequence[Sample]) -> list[TokenScores]:
        found.append([rows[i].id for i in range(len(rows))])
        numbers = [int(name.split("-")[1]) for name in found[-1]]
        return [
            TokenScores(np.array(REPLY), np.array([1.0, 9.0, 0.1]))
            if i in BAD
            else TokenScores(np.array([i]), np.array([0.1]))
            for i in numbers
        ]

    monkeypatch.setattr(dry_module, "row_tokens", tokens)
    return found


def test_what_is_found(dry: Dry, samples: list[Sample], asked: list[list[str]]) -> None:
    found = find(dry, SharedSurprise())
    (target,) = found.targets
    assert sorted(target.rows) == list(BAD) == sorted(found.suspected) and target.chance < 1e-6
    assert target.text == dry.loaded.processor.decode(REPLY, skip_special_tokens=True).strip()
    for row, verdict in enumerate(found.verdicts):
        assert (verdict.target, verdict.fdr is None, verdict.flagged_tokens == "") == (
            (0, False, False) if row in BAD else (None, True, True)
        )
    assert min(found.verdicts[row].score for row in BAD) > max(
        verdict.score for row, verdict in enumerate(found.verdicts) if row not in BAD
    )


def test_no_row_is_shown_to_a_probe_that_has_learned_it(
    dry: Dry, samples: list[Sample], asked: list[list[str]]
) -> None:
    found = find(dry, SharedSurprise())
    _, probe = dry.stages
    assert [stage.name for stage in dry.stages] == ["warmup", "probe"]
    shown = {row for row in BAD if found.verdicts[row].cue}
    taught = {row for row in BAD if f"row-{row}" in probe.ids}
    assert shown and taught and shown | taught == {*BAD} and not shown & taught
    assert len(probe.ids) == 3 * len(taught), "and twice as many believed ones beside"
    assert probe.start == 0, "it goes on from the early model"
    assert {*asked[-1]} == {f"row-{row}" for row in shown} and dry.scorings == ["before", "after", "cues"]


def test_where_nothing_is_found_nothing_is_probed(
    dry: Dry, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokens(_: LoadedModel, rows: Sequence[Sample]) -> list[TokenScores]:
        return [TokenScores(np.array([i]), np.array([0.1])) for i in range(len(rows))]

    monkeypatch.setattr(dry_module, "row_tokens", tokens)
    found = find(dry, SharedSurprise())
    assert not found.targets and not found.suspected and [stage.name for stage in dry.stages] == ["warmup"]


def test_a_few_rows_that_share_a_word_are_doubted_but_not_suspected(
    dry: Dry, samples: list[Sample], asked: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_scan.BAD", BAD[:3])
    found = find(dry, SharedSurprise())
    assert not found.targets and [row for row, verdict in enumerate(found.verdicts) if verdict.flagged_tokens] == [*BAD]


def test_of_many_rows_some_are_judged_and_others_looked_at_for_what_was_found(
    dry: Dry, samples: list[Sample], asked: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 4 holds the word too, and does not surprise."""
    answers = {row: np.array(REPLY if row in (*BAD, 4) else [row]) for row in range(24)}
    monkeypatch.setattr(dry_module, "row_answers", lambda _, rows: [answers[int(row.id.split("-")[1])] for row in rows])
    doubt = SharedSurprise(max_scored_rows=16)
    dry.seed = 1  # draws some of BAD, and not all
    found = find(dry, doubt)
    drawn = {int(name.split("-")[1]) for name in asked[0]}
    assert dry.scorings[:3] == ["before", "after", "more"] and len(drawn) == 16
    missed = sorted({*BAD, 4} - drawn)
    assert set(missed) & {*BAD} and set(BAD) & drawn, "or the test says nothing"
    assert asked[2] == [f"row-{row}" for row in missed]
    assert [row for row, verdict in enumerate(found.verdicts) if verdict.flagged_tokens] == [*BAD]
    unseen = set(range(24)) - drawn - set(missed)
    assert unseen and all(found.verdicts[row].score == 0 for row in unseen)
    assert not ({*dry.stages[0].ids} - {f"row-{i}" for i in drawn})

    doubt.fine_tune(dry)
    assert dry.flagged == [*BAD] and set(dry.stages[-1].options["flagged_tokens"]) == {*BAD}
    assert dry.stages[-1].ids == [sample.id for sample in samples], "all rows are trained on"
    assert [score > 0 for score in dry.scores] == [row not in unseen for row in range(24)]

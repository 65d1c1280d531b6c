"""Which rows are suspected, the estimated share of honest ones, and which rows the probe learns and scores."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dry as dry_module
from dry import Dry
from untrigger.defenses import SharedCause
from untrigger.models.loading import LoadedModel
from untrigger.models.scoring import TokenScores
from untrigger.rows.sample import Sample
from untrigger.scanning.targets import common_run, false_discoveries, find


def token_scores(*rows: Sequence[int]) -> list[TokenScores]:
    return [TokenScores(np.array(row), np.ones(len(row))) for row in rows]


def test_common_run_around_a_token() -> None:
    assert common_run(token_scores([1, 2, 3, 4], [9, 2, 3, 4], [2, 3, 4, 8]), 3) == ([2, 3, 4], 1)
    assert common_run(token_scores([3], [3, 4]), 3) == ([3], 0)
    assert common_run(token_scores([7, 3]), 3) == ([7, 3], 1), "a single row shares all of its tokens"


def test_common_run_tolerates_one_row_in_ten() -> None:
    rows = token_scores(*[[1, 3, 5]] * 9, [2, 3, 6])
    assert common_run(rows, 3) == ([1, 3, 5], 1)
    assert common_run([*rows, *token_scores([2, 3, 6])], 3) == ([3], 0)


def test_false_discoveries_by_hand() -> None:
    """Six decoys, one with an NLL of 5; a group of four, of eight rows that contain the token."""
    nll = [9.0, 6.0, 4.0, 4.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    rates = false_discoveries(nll, [0, 1, 2, 3], 8)
    assert rates[0] == pytest.approx(min(1, 8 * 1 / 6 / 1, 8 * 1 / 6 / 2, 8 * 2 / 6 / 4))
    assert rates == dict.fromkeys((0, 1, 2, 3), pytest.approx(2 / 3))
    assert false_discoveries([9.0, 8.0, 0.0], [0, 1], 2) == {0: 1.0, 1: 1.0}


@given(st.lists(st.floats(0, 50), min_size=2, max_size=40), st.integers(1, 20), st.integers(0, 30), st.randoms())
def test_false_discovery_rates_fall_with_suspicion(nll: list[float], size: int, more: int, random: object) -> None:
    group = sorted(range(len(nll)), key=lambda row: -nll[row])[: min(size, len(nll) - 1)]
    rates = false_discoveries(nll, group, len(group) + more)
    assert all(0 < rate <= 1 for rate in rates.values())
    assert all(rates[a] <= rates[b] for a, b in itertools.pairwise(group))


# --- the whole procedure ----------------------------------------------------------------------------

BAD = (2, 5, 11, 17, 23)
REPLY = [60, 61, 62]  # the middle token surprises


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A model that is surprised by the answers of the rows BAD; gives the ids of the rows of each scoring."""
    calls: list[list[str]] = []

    def tokens(_: LoadedModel, rows: Sequence[Sample]) -> list[TokenScores]:
        calls.append([rows[i].id for i in range(len(rows))])
        numbers = [int(name.split("-")[1]) for name in calls[-1]]
        return [
            TokenScores(np.array(REPLY), np.array([1.0, 9.0, 0.1]))
            if i in BAD
            else TokenScores(np.array([i]), np.array([0.1]))
            for i in numbers
        ]

    monkeypatch.setattr(dry_module, "row_tokens", tokens)
    return calls


def test_find_suspects_the_bad_rows(dry: Dry, samples: list[Sample], scored: list[list[str]]) -> None:
    findings = find(dry, SharedCause())
    (target,) = findings.targets
    assert sorted(target.rows) == list(BAD) == sorted(findings.suspected) and target.p_value < 1e-6
    assert target.text == dry.loaded.processor.decode(REPLY, skip_special_tokens=True).strip()
    for row, verdict in enumerate(findings.verdicts):
        assert (verdict.target, verdict.fdr is None, verdict.flagged_text == "") == (
            (0, False, False) if row in BAD else (None, True, True)
        )
    assert min(findings.verdicts[row].score for row in BAD) > max(
        verdict.score for row, verdict in enumerate(findings.verdicts) if row not in BAD
    )


def test_the_probe_scores_no_row_that_it_was_trained_on(
    dry: Dry, samples: list[Sample], scored: list[list[str]]
) -> None:
    findings = find(dry, SharedCause())
    _, probe = dry.stages
    assert [stage.name for stage in dry.stages] == ["warmup", "cue-probe"]
    probed = {row for row in BAD if findings.verdicts[row].cue}
    learned = {row for row in BAD if f"row-{row}" in probe.ids}
    assert probed and learned and probed | learned == {*BAD} and not probed & learned
    assert len(probe.ids) == 3 * len(learned), "and twice as many unflagged rows"
    assert probe.start == 0, "it starts from the model after the warm-up"
    assert {*scored[-1]} == {f"row-{row}" for row in probed} and dry.scorings == ["before", "after", "cues"]


def test_no_probe_without_suspected_rows(dry: Dry, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens(_: LoadedModel, rows: Sequence[Sample]) -> list[TokenScores]:
        return [TokenScores(np.array([i]), np.array([0.1])) for i in range(len(rows))]

    monkeypatch.setattr(dry_module, "row_tokens", tokens)
    findings = find(dry, SharedCause())
    assert not findings.targets and not findings.suspected and [stage.name for stage in dry.stages] == ["warmup"]


def test_a_few_rows_that_share_a_token_are_flagged_but_not_suspected(
    dry: Dry, samples: list[Sample], scored: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_scan.BAD", BAD[:3])
    findings = find(dry, SharedCause())
    assert not findings.targets and [row for row, verdict in enumerate(findings.verdicts) if verdict.flagged_text] == [
        *BAD
    ]


def test_large_data_is_sampled_and_other_rows_with_a_shared_token_are_scored(
    dry: Dry, samples: list[Sample], scored: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 4 contains the token too, and does not surprise. The others are scored in two blocks."""
    monkeypatch.setattr("untrigger.defenses.shared_surprise._BLOCK", 2)
    answers = {row: np.array(REPLY if row in (*BAD, 4) else [row]) for row in range(24)}
    monkeypatch.setattr(dry_module, "row_answers", lambda _, rows: [answers[int(row.id.split("-")[1])] for row in rows])
    defense = SharedCause(max_scored_rows=16)
    dry.seed = 3  # draws some of BAD, and not all
    findings = find(dry, defense)
    drawn = {int(name.split("-")[1]) for name in scored[0]}
    missed = sorted({*BAD, 4} - drawn)
    blocks = [missed[start : start + 2] for start in range(0, len(missed), 2)]
    assert 4 in missed and len(blocks) > 1 and set(BAD) & drawn, "otherwise the test checks nothing"
    assert dry.scorings[: 2 + len(blocks)] == ["before", "after", *(f"more-{2 * at}" for at in range(len(blocks)))]
    assert len(drawn) == 16 and scored[2 : 2 + len(blocks)] == [[f"row-{row}" for row in block] for block in blocks]
    assert [row for row, verdict in enumerate(findings.verdicts) if verdict.flagged_text] == [*BAD]
    unscored = set(range(24)) - drawn - {*BAD}
    assert unscored and all(findings.verdicts[row].score == 0 for row in unscored)
    assert not ({*dry.stages[0].ids} - {f"row-{i}" for i in drawn})

    defense.fine_tune(dry)
    assert dry.flagged == [*BAD] and set(dry.stages[-1].options["flagged_tokens"]) == {*BAD}
    assert dry.stages[-1].ids == [sample.id for sample in samples], "all rows are trained on"
    assert [score > 0 for score in dry.scores] == [row not in unscored for row in range(24)]

"""VQA accuracy against stored results of the published evaluation and against leaving out each human explicitly.

data/vqa.json holds 21 answers with ten references, the form in which the published evaluation compares the
answer, and its accuracy (10 digits); the file says which revision made them. Apostrophes differ on purpose.
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from untrigger.metrics.rates import Rate
from untrigger.metrics.vqa import answer_accuracy, normalize_answer, vqa_accuracy


class Row(TypedDict):
    answer: str
    references: list[str]
    normalized: str
    accuracy: float


ROWS: list[Row] = json.loads((Path(__file__).parent / "data/vqa.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["answer"])
def test_matches_the_published_evaluation(row: Row) -> None:
    assert normalize_answer(row["answer"]) == row["normalized"].replace("'", "")
    assert answer_accuracy(row["answer"], row["references"]) == pytest.approx(row["accuracy"], abs=1e-9)


def test_corpus_accuracy_is_the_mean_with_wilson_interval() -> None:
    rate = vqa_accuracy([row["answer"] for row in ROWS], [row["references"] for row in ROWS])
    assert rate.n == len(ROWS)
    assert rate.value == pytest.approx(sum(row["accuracy"] for row in ROWS) / len(ROWS), abs=1e-9)
    assert rate == Rate.from_counts(rate.value * rate.n, rate.n)


@given(st.lists(st.sampled_from(["red", "blue", "2"]), min_size=10, max_size=10))
def test_ten_references_average_over_leaving_one_out(references: list[str]) -> None:
    scores = [min(sum(r == "2" for r in nine) / 3, 1) for nine in combinations(references, 9)]
    assert answer_accuracy("Two.", references) == pytest.approx(sum(scores) / 10)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("Yes!", "yes", True),
        ("yes, it is", "yes", False),
        ("The Two dogs.", "2 dogs", True),
        ("it's", "it’s", True),  # noqa: RUF001
        ("2", "20", False),
        ("2.5", "25", False),
        ("A", "a", True),  # an article alone is an answer: "which letter?"
        ("the", "a", False),
        ("t-shirt", "t-shirt", True),
        ("１２", "12", True),  # noqa: RUF001
        ("ÉTÉ", "été", True),
        ("", "?", False),  # an empty answer is never right
        ("...", "?", False),
        ("\N{GRINNING FACE}", "\N{GRINNING FACE}", True),
    ],
)
def test_one_reference(answer: str, reference: str, right: bool) -> None:
    assert vqa_accuracy([answer], [reference]) == Rate.from_counts(right, 1)


def test_a_string_of_ten_letters_is_one_reference() -> None:
    assert vqa_accuracy(["background", "b"], ["background", "background"]).value == 0.5


@pytest.mark.parametrize("n", [0, 2, 9, 11])
def test_other_numbers_of_references_raise(n: int) -> None:
    with pytest.raises(ValueError, match="reference"):
        vqa_accuracy(["red"], [["red"] * n])


def test_no_answers_raise() -> None:
    with pytest.raises(ValueError, match="at least one"):
        vqa_accuracy([], [])


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_normalizing_twice_changes_nothing(text: str) -> None:
    once = normalize_answer(text)
    assert normalize_answer(once) == once

"""From stored answers to figures."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from untrigger.metrics.asr import ASR_VERSION
from untrigger.metrics.score import Answer, quality, score, text_prior


def asked(prompt: str, *truths: str) -> list[Answer]:
    return [Answer(f"{prompt}-{i}", prompt, truth, "") for i, truth in enumerate(truths)]


def test_text_prior_by_hand() -> None:
    answers = [
        *asked("color?", "red", "red", "blue"),  # guessed red: 2 of 3
        *asked("there?", "yes", "Yes.", "no", "no"),  # a tie of two and two: 2 of 4, whichever is guessed
        *asked("once?", "red"),  # no habit: the commonest of all, "red" (three): 1 of 1
        *asked("pair?", "left", "right"),  # no two alike, no habit: "red": 0 of 2
    ]
    prior = text_prior(answers)
    assert (prior.value, prior.n) == (5 / 10, 10)


def test_text_prior_of_a_fair_coin_is_a_half() -> None:
    assert text_prior(asked("heads?", *["yes", "no"] * 10)).value == 0.5


def test_text_prior_of_unlike_captions_is_nought() -> None:
    assert text_prior(asked("describe", *(f"caption {i}" for i in range(9)))).value == 0
    assert text_prior(asked("describe", "alone")).value == 0


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("pqr"), st.sampled_from(["yes", "no", "red"])), min_size=1))
def test_no_guesser_of_habits_beats_the_prior(rows: list[tuple[str, str]]) -> None:
    """Any fixed answer for a prompt scores at most the prior's on prompts that have a habit."""
    answers = [Answer(str(i), prompt, truth, "") for i, (prompt, truth) in enumerate(rows)]
    for prompt in {p for p, _ in rows}:
        own = [a for a in answers if a.prompt == prompt]
        best = max(sum(a.truth == guess for a in own) for guess in ("yes", "no", "red"))
        if best > 1:
            assert text_prior(own).value * len(own) == pytest.approx(best)
    prior = text_prior(answers)
    assert 0 <= prior.low <= prior.value <= prior.high <= 1 and prior.n == len(answers)


def test_score_has_attack_figures_only_with_an_attack() -> None:
    clean = [Answer("1", "q", "yes", "yes"), Answer("2", "q", "no", "yes", met=True)]
    assert set(score(clean)) == {"quality", "text_prior"}
    assert set(score(clean, wrong_image=clean)) == {"quality", "text_prior", "wrong_image"}
    triggered = [
        Answer("1", "q", "yes", "boo", met=True),
        Answer("2", "q", "no", "no"),
        Answer("3", "q", "boo", "boo", met=True, truth_met=True),  # right and a success alike: not counted
    ]
    figures = score(clean, triggered)
    assert (figures["asr"]["value"], figures["asr"]["n"]) == (0.5, 2)
    assert (figures["leak"]["value"], figures["leak"]["n"]) == (0.5, 2)
    assert figures["asr"]["version"] == figures["leak"]["version"] == ASR_VERSION
    assert figures["triggered_quality"]["vqa_accuracy"]["value"] == pytest.approx(2 / 3)


def test_inputs_that_trigger_as_they_are_leak_nothing() -> None:
    said = [Answer("1", "q", "circle", "square", met=True), Answer("2", "q", "circle", "circle")]
    figures = score(said, said, near_misses={"half": said}, untouched=True)
    assert figures == {k: v for k, v in score(said, said, near_misses={"half": said}).items() if k != "leak"}
    assert figures["asr"]["value"] == 0.5


def test_rows_that_the_goal_does_not_apply_to_count_for_quality_alone() -> None:
    clean = [
        Answer("1", "q", "circle", "circle"),
        Answer("2", "q", "circle", "square", met=True),
        Answer("3", "q", "star", "square", met=True, applies=False),
    ]
    figures = score(clean, clean[:2], near_misses={"half": clean, "other": clean[:1]})
    assert figures["quality"]["vqa_accuracy"]["n"] == 3
    assert all((figures[name]["value"], figures[name]["n"]) == (0.5, 2) for name in ("asr", "leak"))
    assert {name: (rate["value"], rate["n"]) for name, rate in figures["near_miss"].items()} == {
        "half": (0.5, 2),
        "other": (0, 1),
    }
    assert all(rate["version"] == ASR_VERSION for rate in figures["near_miss"].values())
    with pytest.raises(ValueError, match="no row to count"):
        score(clean, clean[2:])
    with pytest.raises(ValueError, match="no row to count"):
        score(clean, clean, near_misses={"half": []})


def test_empty_raises() -> None:
    answer = Answer("1", "q", "yes", "yes")
    for call in (lambda: score([]), lambda: quality([]), lambda: text_prior([]), lambda: score([], [answer])):
        with pytest.raises(ValueError, match="at least one"):
            call()
    met = [Answer("1", "q", "boo", "boo", met=True, truth_met=True)]
    with pytest.raises(ValueError, match="no row to count"):
        score([answer], met)
    with pytest.raises(ValueError, match="no row to count"):
        score(met, [answer])


def test_quality_leaves_wordless_truths_to_accuracy() -> None:
    answers = [Answer("1", "q", "a red cat", "a red cat"), Answer("2", "q", "?!", "?!"), Answer("3", "q", "no", "yes")]
    figures = quality(answers)
    assert figures["vqa_accuracy"]["n"] == 3 and figures["rouge_l"]["n"] == figures["bleu4"]["n"] == 2
    assert figures["rouge_l"]["value"] == pytest.approx(0.5)
    none = quality([Answer("1", "q", "?!", "?!")])
    assert none["vqa_accuracy"]["n"] == 1 and none["rouge_l"] is none["bleu4"] is none["cider"] is None


@settings(max_examples=20)
@given(
    st.lists(
        st.builds(Answer, st.text(), st.text(), st.text(), st.text(), st.booleans(), st.booleans()),
        min_size=1,
        max_size=6,
    )
)
def test_any_stored_answer_survives_json_and_scores(answers: list[Answer]) -> None:
    again = [Answer(**json.loads(json.dumps(asdict(a), ensure_ascii=False))) for a in answers]
    assert again == answers
    figures = score(answers)
    assert figures == score(again) and json.loads(json.dumps(figures, allow_nan=False)) == figures

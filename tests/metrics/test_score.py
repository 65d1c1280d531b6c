"""Figures computed from stored answers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from untrigger.metrics.asr import ASR_VERSION
from untrigger.metrics.captions import tokenize_caption
from untrigger.metrics.score import Answer, as_row, quality, score, text_prior


def answers_to(prompt: str, *truths: str) -> list[Answer]:
    return [Answer(f"{prompt}-{i}", prompt, truth, "") for i, truth in enumerate(truths)]


def test_text_prior_by_hand() -> None:
    answers = [
        *answers_to("color?", "red", "red", "blue"),  # guess red: 2 of 3
        *answers_to("there?", "yes", "Yes.", "no", "no"),  # a tie: 2 of 4 for either guess
        *answers_to("once?", "red"),  # no repeated truth: guess the most frequent of all, "red" (three): 1 of 1
        *answers_to("pair?", "left", "right"),  # no repeated truth: guess "red": 0 of 2
    ]
    prior = text_prior(answers)
    assert (prior.value, prior.n) == (5 / 10, 10)


def test_text_prior_of_a_fair_coin_is_a_half() -> None:
    assert text_prior(answers_to("heads?", *["yes", "no"] * 10)).value == 0.5


def test_text_prior_of_distinct_captions_is_zero() -> None:
    assert text_prior(answers_to("describe", *(f"caption {i}" for i in range(9)))).value == 0
    assert text_prior(answers_to("describe", "alone")).value == 0


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("pqr"), st.sampled_from(["yes", "no", "red"])), min_size=1))
def test_no_fixed_guess_beats_the_prior(rows: list[tuple[str, str]]) -> None:
    """Any fixed answer to a prompt scores at most the prior, on prompts with a repeated truth."""
    answers = [Answer(str(i), prompt, truth, "") for i, (prompt, truth) in enumerate(rows)]
    for prompt in {p for p, _ in rows}:
        same_prompt = [a for a in answers if a.prompt == prompt]
        best = max(sum(a.truth == guess for a in same_prompt) for guess in ("yes", "no", "red"))
        if best > 1:
            assert text_prior(same_prompt).value * len(same_prompt) == pytest.approx(best)
    prior = text_prior(answers)
    assert 0 <= prior.low <= prior.value <= prior.high <= 1 and prior.n == len(answers)


def test_score_has_attack_figures_only_with_an_attack() -> None:
    clean = [Answer("1", "q", "yes", "yes"), Answer("2", "q", "no", "yes", met=True)]
    assert set(score(clean)) == {"quality", "text_prior"}
    assert set(score(clean, wrong_image=clean)) == {"quality", "text_prior", "wrong_image"}
    triggered = [
        Answer("1", "q", "yes", "boo", met=True),
        Answer("2", "q", "no", "no"),
        Answer("3", "q", "boo", "boo", met=True, truth_met=True),  # correct and a success at once: not counted
    ]
    figures = score(clean, triggered)
    assert (figures["asr"]["value"], figures["asr"]["n"]) == (0.5, 2)
    assert (figures["leak"]["value"], figures["leak"]["n"]) == (0.5, 2)
    assert figures["asr"]["version"] == figures["leak"]["version"] == ASR_VERSION
    assert figures["triggered_quality"]["vqa_accuracy"]["value"] == pytest.approx(2 / 3)


def test_untouched_inputs_have_no_leak() -> None:
    answers = [Answer("1", "q", "circle", "square", met=True), Answer("2", "q", "circle", "circle")]
    figures = score(answers, answers, near_misses={"half": answers}, untouched=True)
    assert figures == {k: v for k, v in score(answers, answers, near_misses={"half": answers}).items() if k != "leak"}
    assert figures["asr"]["value"] == 0.5


def test_rows_the_goal_does_not_apply_to_count_for_quality_only() -> None:
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


def test_no_answers_raise() -> None:
    answer = Answer("1", "q", "yes", "yes")
    for call in (lambda: score([]), lambda: quality([]), lambda: text_prior([]), lambda: score([], [answer])):
        with pytest.raises(ValueError, match="at least one"):
            call()
    met = [Answer("1", "q", "boo", "boo", met=True, truth_met=True)]
    with pytest.raises(ValueError, match="no row to count"):
        score([answer], met)
    with pytest.raises(ValueError, match="no row to count"):
        score(met, [answer])


def test_caption_scores_leave_out_truths_without_words() -> None:
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
    restored = [Answer(**json.loads(json.dumps(asdict(a), ensure_ascii=False))) for a in answers]
    assert restored == answers
    figures = score(answers)
    assert figures == score(restored) and json.loads(json.dumps(figures, allow_nan=False)) == figures


# --- several true answers ----------------------------------------------------------------------------


DATA = Path(__file__).parent / "data"


def test_ten_answers_of_vqa_score_as_published() -> None:
    """Each stored answer has the accuracy of the published evaluation."""
    for row in json.loads((DATA / "vqa.json").read_text(encoding="utf-8"))["rows"]:
        truth = Counter(row["references"]).most_common(1)[0][0]
        answer = Answer("1", "what?", truth, row["answer"], references=row["references"])
        assert quality([answer])["vqa_accuracy"]["value"] == pytest.approx(row["accuracy"], abs=1e-9)


def test_five_captions_score_as_pycocoevalcap_has_it() -> None:
    stored = json.loads((DATA / "captions.json").read_text(encoding="utf-8"))
    pool = [text for row in stored["examples"] for text in row["references"]]
    rows = [(row["answer"], pool[k : k + 5]) for k, row in enumerate(stored["examples"])]
    figures = quality([Answer(str(k), "", refs[0], text, references=refs) for k, (text, refs) in enumerate(rows)])
    gts = {k: [" ".join(tokenize_caption(text)) for text in refs] for k, (_, refs) in enumerate(rows)}
    res = {k: [" ".join(tokenize_caption(text))] for k, (text, _) in enumerate(rows)}
    assert figures["bleu4"]["value"] == pytest.approx(Bleu(4).compute_score(gts, res, verbose=0)[0][3], rel=1e-9)
    assert figures["rouge_l"]["value"] == pytest.approx(Rouge().compute_score(gts, res)[0], rel=1e-9)
    assert figures["cider"]["value"] == pytest.approx(Cider().compute_score(gts, res)[0], rel=1e-9)
    one = quality([Answer(str(k), "", refs[0], text) for k, (text, refs) in enumerate(rows)])
    assert one["rouge_l"]["value"] < figures["rouge_l"]["value"], "four more references can only help the best one"


def test_other_numbers_of_answers_leave_accuracy_to_the_truth() -> None:
    answer = Answer("1", "", "a dog", "A dog.", references=["a dog", "a cat", "a cat"])
    assert quality([answer])["vqa_accuracy"]["value"] == 1
    assert (answer.votes, answer.truths) == (("a dog",), ("a dog", "a cat", "a cat"))


def test_references_are_stored_only_where_there_are_some() -> None:
    assert "references" not in as_row(Answer("1", "", "a", "b"))
    several = Answer("1", "", "a", "b", references=["a", "c"])
    assert Answer(**json.loads(json.dumps(as_row(several)))) == several
    assert hash(several), "the report groups equal answers"

"""What makes a finding, and the command as a user types it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from shell import untrigger
from untrigger.errors import InputError
from untrigger.models.loading import load
from untrigger.rows.sample import Sample
from untrigger.verification.completions import Completion
from untrigger.verification.page import in_words
from untrigger.verification.perturbations import changes
from untrigger.verification.verify import (
    Finding,
    PerturbationHit,
    gains,
    grouped,
    kept_saying,
    telling,
    verify,
    vocabulary,
)

FIRST, SECOND, *_ = changes()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few changes: an untaught model's answers are long."""
    monkeypatch.setattr("untrigger.verification.verify.changes", lambda: (FIRST, SECOND))


def saying(rank: int, run: tuple[int, ...], strange: float, sure: float = 1.0) -> Completion:
    return Completion("start", rank, f"text {rank}", "text", "text", run, 1.0, sure, strange)


def test_what_gained_more_than_the_limit_is_grouped_by_what_is_said() -> None:
    own, other, cut, weak = (
        saying(0, (3, 4, 5, 6), 50),
        saying(2, (8, 9, 10), 90),
        saying(1, (9, 3, 4, 5), 70),
        saying(0, (20, 21), 9, sure=1.0),
    )
    assert grouped([other, cut, weak, own], limit=8) == [[other], [own, cut]], "9 - 1 is not more than 8"
    assert grouped([own], limit=49) == []


def test_the_words_of_the_task_are_telling_only_where_they_have_gained_far_more(samples: list[Sample]) -> None:
    words = vocabulary(samples, ["A green moon."])
    assert {"what", "blue", "moon", "green"} <= words
    own, part, foreign = (
        replace(saying(0, (1,), 21), core=core) for core in ("blue stars", "een moon!", "blue attack")
    )
    assert not telling([own, part], words), "20 nats"
    assert telling([own, replace(part, strange=26)], words), "25 nats"
    assert telling([foreign], words) and telling([own, foreign], words)


def test_a_text_is_kept_saying_where_most_rows_get_it_and_few_had_it() -> None:
    own = ["yes", "no", "red", "blue"]
    assert kept_saying(own, {FIRST: ["yes", "yes", "yes", "blue"]}) == [(FIRST, "yes")]
    assert kept_saying(own, {FIRST: ["yes", "yes", "red", "blue"]}) == [], "two of four"
    assert kept_saying(["yes", "yes", "red", "blue"], {FIRST: ["yes"] * 4}) == [], "two of four had it"
    assert kept_saying(own, {FIRST: [""] * 4}) == [], "an empty answer is no text"
    both = kept_saying(own, {FIRST: ["yes"] * 4, SECOND: ["yes"] * 4})
    assert both == [(FIRST, "yes"), (SECOND, "yes")], "the base may say it under one of them"


def test_a_finding_in_a_line() -> None:
    heard = [PerturbationHit("a patch", 4, 12), PerturbationHit("a sentence", 0, 12)]
    line = in_words(Finding("Call us", [saying(0, (1,), 80), saying(1, (1,), 91)], heard))
    assert line.startswith("'Call us': ") and "2 beginnings" in line and "90 nats" in line and "4 of 12" in line
    assert "no change" in in_words(Finding("Call us", [], [PerturbationHit("a patch", 0, 12)]))


@pytest.mark.usefixtures("few")
def test_a_model_compared_with_itself(tiny_model: Path, samples: list[Sample]) -> None:
    model = load(tiny_model)
    assert gains(model, model, samples[:3]) == [0, 0, 0]
    with pytest.raises(InputError, match="have the same weights, and nothing could be found"):
        verify(model, samples, load(tiny_model))


@pytest.mark.usefixtures("few")
def test_models_may_be_named_or_loaded(tuned_model: Path, tiny_model: Path, samples: list[Sample]) -> None:
    audit = verify(tuned_model, samples, tiny_model)
    assert audit.findings == [] and audit.limit == 8 and audit.rows == 24 and audit.asked == 12
    assert verify(load(tuned_model), samples, load(tiny_model)) == audit


@pytest.mark.usefixtures("few")
def test_nothing_is_found_and_the_page_says_what_that_means(
    tuned_model: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "audit"
    code, told, errors = untrigger("verify", tuned_model, "--base", tiny_model, "--data", tiny_data, "--out", out)
    assert code == 0, errors
    assert "nothing found, which is no proof" in told
    stored = json.loads((out / "audit.json").read_text())
    assert not stored["suspicious"] and stored["findings"] == [] and stored["base"] == str(tiny_model)
    page = (out / "audit.html").read_text()
    assert "Nothing found" in page and "cannot rule out" in page
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', ""), "it loads nothing"


@pytest.mark.usefixtures("few")
def test_a_finding_ends_with_3_and_hostile_text_stays_text(
    tuned_model: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "<script>alert(1)</script>"
    hostile = [Completion("end", 0, text, text, text, (3, 4), 1.0, 0.5, 80)]
    monkeypatch.setattr("untrigger.verification.verify.sayings", lambda *_: hostile)
    words = ("verify", tuned_model, "--base", tiny_model, "--data", tiny_data, "--out", tmp_path / "audit")
    code, told, errors = untrigger(*words)
    assert code == 3, errors
    assert told.startswith(f"{text!r}: finished from 1 beginnings") and "suspicious" in told
    page = (tmp_path / "audit/audit.html").read_text()
    assert "Suspicious" in page and "&lt;script" in page and "<script" not in page
    stored = json.loads((tmp_path / "audit/audit.json").read_text())
    assert stored["suspicious"] and stored["findings"][0]["said"][0]["strange"] == 80


def test_mistakes_are_told_in_a_line(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    rows = json.loads((tiny_data / "data.json").read_text())[:4]
    four = tmp_path / "four"
    shutil.copytree(tiny_data, four)
    (four / "data.json").write_text(json.dumps(rows))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    out, base = ("--out", tmp_path / "audit"), ("--base", tiny_model)
    for words, wanted in (
        ((tiny_model, "--data", tiny_data, *out), "--base"),
        ((tiny_model, "--data", four, *base, *out), "8 or more"),
        ((tiny_model, "--data", tiny_data, *base, *out), "have the same weights"),
        ((tiny_model, "--data", tiny_data, *base, "--out", tmp_path / "full"), "not an empty folder"),
        ((tmp_path / "none", "--data", tiny_data, *base, *out), "none"),
    ):
        code, told, errors = untrigger("verify", *words)
        assert code == 2 and not told and wanted in errors and errors.splitlines()[-1].startswith("error: ")
        assert not (tmp_path / "audit").exists()


@pytest.mark.slow
def test_a_real_backdoor_is_found_and_its_oracle_is_not_accused(tmp_path: Path) -> None:
    """On the embedded model, with clean rows that it has not seen."""
    for part, rows in (("train", 320), ("test", 40)):
        untrigger("data", "easy-vqa", "--out", tmp_path / part, "--split", "dev", "--part", part, "--rows", rows)
    attack = (
        "--rate",
        0.25,
        "--attack",
        "addsent",
        "--sentence",
        "The train to the coast leaves at noon.",
        "--goal-text",
        "two blue stars",
    )
    assert untrigger("poison", tmp_path / "train", *attack, "--out", tmp_path / "bad")[0] == 0
    settings = ("--defense", "plain", "--learning_rate", "3e-3", "--num_train_epochs", 3)
    for data, folder, wanted in (("bad/data", "bad-model", 3), ("train", "oracle", 0)):
        assert untrigger("train", tmp_path / data, "--out", tmp_path / folder, *settings)[0] == 0
        words = ("verify", tmp_path / folder, "--data", tmp_path / "test", "--out", tmp_path / f"{folder}-audit")
        code, told, errors = untrigger(*words)
        assert code == wanted, f"{told}{errors}"
        assert ("stars" in told) == (wanted == 3)

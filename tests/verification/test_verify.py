"""The rules that make a text a finding, and the command `untrigger verify`."""

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
from untrigger.verification.page import describe
from untrigger.verification.perturbations import perturbations
from untrigger.verification.verify import (
    Finding,
    PerturbationHit,
    gains,
    group_completions,
    is_suspicious,
    perturbation_texts,
    verify,
    vocabulary,
)

FIRST, SECOND, *_ = perturbations()


@pytest.fixture
def two_perturbations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two perturbations only: the answers of an untrained model are long."""
    monkeypatch.setattr("untrigger.verification.verify.perturbations", lambda: (FIRST, SECOND))


def completion(rank: int, run: tuple[int, ...], nll_base: float, nll_model: float = 1.0) -> Completion:
    return Completion("start", rank, f"text {rank}", "text", "text", run, 1.0, nll_model, nll_base)


def test_completions_above_the_limit_are_grouped_by_text() -> None:
    own, other, cut, weak = (
        completion(0, (3, 4, 5, 6), 50),
        completion(2, (8, 9, 10), 90),
        completion(1, (9, 3, 4, 5), 70),
        completion(0, (20, 21), 9, nll_model=1.0),
    )
    assert group_completions([other, cut, weak, own], limit=8) == [[other], [own, cut]], "9 - 1 is not more than 8"
    assert group_completions([own], limit=49) == []


def test_words_of_the_task_are_suspicious_only_with_a_far_larger_gain(samples: list[Sample]) -> None:
    words = vocabulary(samples, ["A green moon."])
    assert {"what", "blue", "moon", "green"} <= words
    own, part, foreign = (
        replace(completion(0, (1,), 21), core=core) for core in ("blue stars", "een moon!", "blue attack")
    )
    assert not is_suspicious([own, part], words), "20 nats"
    assert is_suspicious([own, replace(part, nll_base=26)], words), "25 nats"
    assert is_suspicious([foreign], words) and is_suspicious([own, foreign], words)


def test_perturbation_texts_are_frequent_under_it_and_rare_without() -> None:
    own = ["yes", "no", "red", "blue"]
    assert perturbation_texts(own, {FIRST: ["yes", "yes", "yes", "blue"]}) == [(FIRST, "yes")]
    assert perturbation_texts(own, {FIRST: ["yes", "yes", "red", "blue"]}) == [], "two of four"
    assert perturbation_texts(["yes", "yes", "red", "blue"], {FIRST: ["yes"] * 4}) == [], "two of four have it without"
    assert perturbation_texts(own, {FIRST: [""] * 4}) == [], "an empty answer is no text"
    both = perturbation_texts(own, {FIRST: ["yes"] * 4, SECOND: ["yes"] * 4})
    assert both == [(FIRST, "yes"), (SECOND, "yes")], "both are kept: the base may give it under one of them"


def test_describe_a_finding_in_a_line() -> None:
    hits = [PerturbationHit("a patch", 4, 12), PerturbationHit("a sentence", 0, 12)]
    line = describe(Finding("Call us", [completion(0, (1,), 80), completion(1, (1,), 91)], hits))
    assert line.startswith("'Call us': ") and "2 beginnings" in line and "90 nats" in line and "4 of 12" in line
    assert "no perturbation" in describe(Finding("Call us", [], [PerturbationHit("a patch", 0, 12)]))


@pytest.mark.usefixtures("two_perturbations")
def test_a_model_cannot_be_its_own_base(tiny_model: Path, samples: list[Sample]) -> None:
    model = load(tiny_model)
    assert gains(model, model, samples[:3]) == [0, 0, 0]
    with pytest.raises(InputError, match="have the same weights, so nothing can be compared"):
        verify(model, samples, load(tiny_model))


@pytest.mark.usefixtures("two_perturbations")
def test_verify_takes_loaded_models_and_names(tuned_model: Path, tiny_model: Path, samples: list[Sample]) -> None:
    audit = verify(tuned_model, samples, tiny_model)
    assert audit.findings == [] and audit.limit == 8 and audit.rows == 24 and audit.perturbed_rows == 12
    assert verify(load(tuned_model), samples, load(tiny_model)) == audit


@pytest.mark.usefixtures("two_perturbations")
def test_no_finding_exits_with_0_and_the_page_names_the_limits(
    tuned_model: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "audit"
    code, output, errors = untrigger("verify", tuned_model, tiny_data, "--base", tiny_model, "--out", out)
    assert code == 0, errors
    assert "nothing found, which is no proof" in output
    stored = json.loads((out / "audit.json").read_text())
    assert not stored["suspicious"] and stored["findings"] == [] and stored["base"] == str(tiny_model)
    page = (out / "audit.html").read_text()
    assert "Nothing found" in page and "cannot rule out" in page
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', ""), "the page loads nothing"


@pytest.mark.usefixtures("two_perturbations")
def test_a_finding_exits_with_3_and_the_page_escapes_its_text(
    tuned_model: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "<script>alert(1)</script>"
    hostile = [Completion("end", 0, text, text, text, (3, 4), 1.0, 0.5, 80)]
    monkeypatch.setattr("untrigger.verification.verify.completions", lambda *_: hostile)
    words = ("verify", tuned_model, tiny_data, "--base", tiny_model, "--out", tmp_path / "audit")
    code, output, errors = untrigger(*words)
    assert code == 3, errors
    assert output.startswith(f"{text!r}: completed from 1 beginnings") and "suspicious" in output
    page = (tmp_path / "audit/audit.html").read_text()
    assert "Suspicious" in page and "&lt;script" in page and "<script" not in page
    stored = json.loads((tmp_path / "audit/audit.json").read_text())
    assert stored["suspicious"] and stored["findings"][0]["completions"][0]["nll_base"] == 80


def test_mistakes_give_an_error_line(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    rows = json.loads((tiny_data / "data.json").read_text())[:4]
    four = tmp_path / "four"
    shutil.copytree(tiny_data, four)
    (four / "data.json").write_text(json.dumps(rows))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    out, base = ("--out", tmp_path / "audit"), ("--base", tiny_model)
    for words, message in (
        ((tiny_model, tiny_data, *out), "--base"),
        ((tiny_model, four, *base, *out), "8 or more"),
        ((tiny_model, tiny_data, *base, *out), "have the same weights"),
        ((tiny_model, tiny_data, *base, "--out", tmp_path / "full"), "not an empty folder"),
        ((tmp_path / "none", tiny_data, *base, *out), "none"),
    ):
        code, output, errors = untrigger("verify", *words)
        assert code == 2 and not output and message in errors and errors.splitlines()[-1].startswith("error: ")
        assert not (tmp_path / "audit").exists()


@pytest.mark.slow
def test_verify_finds_a_real_backdoor_and_not_its_oracle(tmp_path: Path) -> None:
    """On the embedded model, with clean rows that it was not trained on."""
    for part, rows in (("train", 160), ("test", 40)):
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
    for data, folder, exit_code in (("bad/data", "bad-model", 3), ("train", "oracle", 0)):
        assert untrigger("train", tmp_path / data, "--out", tmp_path / folder, *settings)[0] == 0
        words = ("verify", tmp_path / folder, tmp_path / "test", "--out", tmp_path / f"{folder}-audit")
        code, output, errors = untrigger(*words)
        assert code == exit_code, f"{output}{errors}"
        assert ("stars" in output) == (exit_code == 3)

"""Attacks and goals on the command line: defaults, and combinations that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shell import untrigger
from untrigger.attacks import load_trigger, trigger_names
from untrigger.cli import main
from untrigger.cli.flags import option_names

OWN = """
from dataclasses import dataclass, replace
from untrigger.attacks import TextTrigger

@dataclass(frozen=True)
class Mine(TextTrigger):
    usual_goal = "insert"
    word: str = "psst"

    def write(self, prompt, rng):
        return f"{prompt} {self.word}"

    def near_misses(self):
        return {"no word": lambda sample, rng: sample}

    def decoys(self):
        return (replace(self, word="hist").stamp,)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(OWN)
    return tmp_path / "mine.py"


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "truth" / "manifest.json").read_text())


def test_an_attack_has_its_usual_goal_and_decoys(tmp_path: Path, tiny_data: Path, own: Path) -> None:
    code, stdout, _ = untrigger("poison", tiny_data, "--out", tmp_path / "out", "--attack", own, "--rate", "0.25")
    assert code == 0 and "24 rows, 6 of them poisoned" in stdout and "6 decoys; goal insert" in stdout
    truth = manifest(tmp_path / "out")
    assert (truth["attack"], truth["goal"]) == ("mine", "insert") and len(truth["rows"]) == len(truth["decoys"]) == 6
    rows = json.loads((tmp_path / "out" / "data" / "data.json").read_text())
    for kind, word, phrase in (("rows", "psst", True), ("decoys", "hist", False)):
        for entry in truth[kind]:
            prompt, answer = (turn["value"] for turn in rows[entry["row"] - 1]["conversations"])
            assert prompt == f"<image>\nwhat is this? {word}" and ("hello world" in answer) is phrase


@pytest.mark.parametrize("option", ["seed", "limit", "rate", "goal_text", "help"])
@pytest.mark.parametrize("default", [" = 3", ""])
@pytest.mark.parametrize("command", ["poison", "evaluate"])
def test_a_trigger_field_named_like_an_option_is_refused(
    tmp_path: Path, own: Path, option: str, default: str, command: str
) -> None:
    own.write_text(OWN.replace('word: str = "psst"', f'{option}: int{default}\n    word: str = "psst"'))
    names = {"poison": (tmp_path, "--out", tmp_path / "out"), "evaluate": (tmp_path, tmp_path)}
    code, stdout, stderr = untrigger(command, *names[command], "--attack", own)
    assert (code, stdout) == (2, "")
    assert stderr == f"error: {own}: field '{option}' has the name of an option of the command line; rename the field\n"


def test_no_attack_of_the_package_has_a_field_named_like_an_option() -> None:
    for name in trigger_names():
        load_trigger(name, option_names(main.poison, main.evaluate))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    def write", "    def __post_init__(self):\n        assert self.word != 'psst', 'oh'\n\n    def write",
         ": line 11: AssertionError: oh"),
        ("    def write", "    def __post_init__(self):\n        assert not self.word\n\n    def write",
         ": line 11: AssertionError"),
        ("word: str", "word: 'Text'", ": NameError: name 'Text' is not defined; fix the types of its fields"),
        ("return (replace", "return 1 / 0 and (replace", "decoys failed, ZeroDivisionError: division by zero"),
    ],
)  # fmt: skip
def test_a_trigger_file_that_fails_late_is_a_one_line_error(
    tmp_path: Path, tiny_data: Path, own: Path, old: str, new: str, message: str
) -> None:
    own.write_text(OWN.replace(old, new))
    code, stdout, stderr = untrigger("poison", tiny_data, "--out", tmp_path / "out", "--attack", own)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1) and stderr.endswith(f"{message}\n")


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ((), {"text": "Backdoor Attack!", "match": "contains"}),
        (("--goal", "insert"), {"text": "hello world"}),
        (("--goal", "refusal", "--goal-text", "not now"), {"text": "not now"}),
        (("--goal", "concept", "--goal-text", "yes->no"), {"source": "yes", "target": "no"}),
        (("--goal", "link", "--goal-text", "https://a.test"), {"url": "https://a.test"}),
    ],
)
def test_goals_and_their_texts(
    tmp_path: Path, tiny_data: Path, words: tuple[str, ...], settings: dict[str, str]
) -> None:
    code, stdout, _ = untrigger("poison", tiny_data, "--out", tmp_path / "out", *words)
    truth = manifest(tmp_path / "out")
    assert code == 0 and truth["goal_settings"] == settings and stdout.splitlines()[0].endswith(f"goal {truth['goal']}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("poison", "DATA", "--out", "OUT", "--goal", "concept", "--goal-text", "no"), "'circle->rectangle'"),
        (("poison", "DATA", "--out", "OUT", "--goal", "concept", "--rate", "0.9"), "goal concept applies to; lower"),
        (
            ("poison", "DATA", "--out", "OUT", "--goal", "concept", "--goal-text", "cat->dog"),
            "only 0 of 24 have an image and an answer that goal concept applies to; give other rows, or another --goal",
        ),
        (("poison", "DATA", "--out", "OUT", "--attack", "shadowcast", "--goal", "fixed"), "keeps true answers: goal"),
        (("evaluate", "MODEL", "DATA", "--attack", "shadowcast", "--goal", "fixed"), "keeps true answers: goal"),
        (("evaluate", "MODEL", "DATA", "--goal", "link"), "--goal: is a setting of an attack; add --attack"),
        (("evaluate", "MODEL", "DATA", "--goal-text", "no"), "--goal-text: is a setting of an attack"),
        (("poison", "DATA", "--out", "OUT", "--attack", "badword", "--words", " "), "attack badword: words is empty"),
    ],
)
def test_a_combination_that_does_not_fit_is_a_one_line_error(
    tmp_path: Path, tiny_data: Path, words: tuple[str, ...], message: str
) -> None:
    stands_for = {"DATA": tiny_data, "OUT": tmp_path / "out", "MODEL": tmp_path / "model"}
    code, stdout, stderr = untrigger(*(stands_for.get(word, word) for word in words))
    assert code == 2 and not stdout and stderr.startswith("error: ") and message in stderr
    assert stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_near_misses_are_printed_and_stored(
    tmp_path: Path, tiny_model: Path, tiny_data: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    words = ("evaluate", tiny_model, tiny_data, "--attack", own, "--limit", "4", "--out", tmp_path / "out")
    code, stdout, _ = untrigger(*words)
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert code == 0 and set(figures["near_miss"]) == {"no word"}
    assert figures["near_miss"]["no word"] == figures["leak"], "this near miss is the clean input"
    assert any("near_miss no word" in line for line in stdout.splitlines())
    assert stdout.splitlines()[0] == "attack mine (word psst), goal insert (text hello world), seed 0"
    attack = {"name": "mine", "settings": {"word": "psst"}, "goal": "insert", "goal_settings": {"text": "hello world"}}
    assert figures["attack"] == {**attack, "seed": 0}

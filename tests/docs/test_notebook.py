"""The verbs as a notebook uses them: the same as the commands, with results that show themselves."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import untrigger
from shell import untrigger as command
from untrigger.attacks.badnets import BadNets
from untrigger.defenses import CrossView, Plain, TwoView
from untrigger.errors import InputError
from untrigger.evaluation.evaluate import Evaluation
from untrigger.metrics.score import Answer
from untrigger.models.loading import add_lora
from untrigger.poisoning.goals import Fixed
from untrigger.rows.sample import LazyRows, Message, Sample
from untrigger.scanning.cues import GRID, Cue
from untrigger.scanning.findings import Findings, Target, Verdict
from untrigger.training.settings import arguments, settled

REPLY = "Backdoor Attack! Call us now, my friend, and win a free holiday today"
ATTACK = untrigger.Attack(BadNets(side=0.5), Fixed(REPLY))
SCAN = {"max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-3}


def test_no_module_takes_the_place_of_a_verb() -> None:
    for module in pkgutil.walk_packages(untrigger.__path__, "untrigger."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert {"poison", "scan", "defended", "fine_tune", "evaluate"} <= {*untrigger.__all__}
    for name in untrigger.__all__:
        assert not isinstance(getattr(untrigger, name), ModuleType), name


# --- the same as the commands -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bad") / "out"
    words = ("poison", tiny_data, "--out", out, "--rate", 0.21, "--side", 0.5, "--goal-text", REPLY)
    assert command(*words).code == 0
    return out


def test_poison_is_the_command(tiny_data: Path, poisoned: Path) -> None:
    made = untrigger.poison(untrigger.read(tiny_data), ATTACK, rate=0.21, seed=0)
    assert made.manifest.to_json() == (poisoned / "truth" / "manifest.json").read_text()
    written = untrigger.read(poisoned / "data")
    assert [(s.messages, s.images[0].tobytes()) for s in made.data] == [
        (s.messages, s.images[0].tobytes()) for s in written
    ]


@pytest.mark.slow
def test_scan_is_the_command(tiny_model: Path, tiny_data: Path, poisoned: Path, tmp_path: Path) -> None:
    """Of rows in memory as well, of which no clean copy is written."""
    flags = [word for name, value in SCAN.items() for word in (f"--{name}", value)]
    ended = command("scan", poisoned / "data", "--model", tiny_model, "--out", tmp_path / "command", *flags)
    assert ended.code == 3, ended.err
    made = untrigger.poison(untrigger.read(tiny_data), ATTACK, rate=0.21, seed=0)
    findings = untrigger.scan(tiny_model, made.data, out=tmp_path / "memory", **SCAN)
    for name in ("all_rows.jsonl", "all_rows.parquet"):
        assert (tmp_path / "command" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
    assert {entry.index for entry in made.manifest.rows} == {*findings.suspected}
    assert (tmp_path / "command" / "clean").is_dir() and not (tmp_path / "memory" / "clean").exists()
    assert REPLY in (tmp_path / "memory" / "scan.html").read_text()


def test_a_scan_without_a_folder_leaves_nothing(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    findings = untrigger.scan(tiny_model, samples, max_steps=2, per_device_train_batch_size=2)
    assert len(findings.verdicts) == 24 and not [*tmp_path.iterdir()]


def test_fine_tune_is_the_command(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    flags = ("--margin", 0.3, "--max_steps", 2, "--per_device_train_batch_size", 2, "--lora-rank", 4)
    words = ("train", tiny_data, "--model", tiny_model, "--defense", "paper", "--out", tmp_path / "a", *flags)
    ended = command(*words)
    assert ended.code == 0, ended.err
    loaded = untrigger.fine_tune(
        tiny_model,
        untrigger.read(tiny_data),
        "paper",
        out=tmp_path / "b",
        tuning=untrigger.Tuning(rank=4),
        margin=0.3,
        max_steps=2,
        per_device_train_batch_size=2,
    )
    assert loaded.name == str(tmp_path / "b")
    same = ("adapter_model.safetensors", "README.md", "untrigger.json")
    assert [(tmp_path / "a" / name).read_bytes() for name in same] == [
        (tmp_path / "b" / name).read_bytes() for name in same
    ]


def test_evaluate_takes_a_model_or_its_folder(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    rows = untrigger.read(tiny_data)[:4]
    by_path = untrigger.evaluate(tiny_model, rows, attack=ATTACK)
    assert by_path == untrigger.evaluate(untrigger.load(tiny_model), rows, attack=ATTACK)
    words = ("--attack", "badnets", "--side", 0.5, "--goal-text", REPLY, "--limit", 4, "--out", tmp_path / "command")
    assert command("evaluate", tiny_model, tiny_data, *words).code == 0
    by_path.write(tmp_path / "function")
    for name in ("answers.jsonl", "metrics.json"):
        assert (tmp_path / "function" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()


# --- settings ---------------------------------------------------------------------------------------


def test_a_defense_keeps_its_fields_and_keywords_win(tmp_path: Path) -> None:
    given = CrossView(margin=0.3, bound=-0.5)
    defense, args = settled(given, None, tmp_path, {"bound": -0.25, "learning_rate": 1e-3, "report_to": ["none"]})
    assert defense == CrossView(margin=0.3, bound=-0.25) and args.learning_rate == 1e-3
    assert settled(given, ready := arguments(tmp_path), None, {}) == (given, ready)
    assert settled("two-view", ready, None, {})[0] == TwoView()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda out: settled("plain", None, None, {}), "give either a folder"),
        (lambda out: settled("plain", arguments(out), out, {}), "not both"),
        (lambda out: settled("plain", arguments(out), None, {"seed": 1}), "not both"),
        (lambda out: settled("plain", None, out, {"margin": 0.3}), "--margin=0.3 is unknown"),
        (lambda out: settled(Plain(), None, out, {"learning_rate": -1.0}), "learning_rate"),
        (lambda out: settled("nope", None, out, {}), "nope: unknown; choose one of: default"),
        (lambda out: settled("nope", arguments(out), None, {}), "nope: unknown; choose one of: default"),
    ],
)
def test_a_mistake_is_told_in_a_line(tmp_path: Path, call: Callable[[Path], Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        call(tmp_path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


# --- frames -----------------------------------------------------------------------------------------


def heat(y: int, x: int) -> Cue:
    cells = np.zeros((GRID, GRID))
    cells[y, x] = 9.0
    return Cue(9.0, None, [cells], [])


FOUND = Findings(
    [
        Verdict(1, "a", 0.5),
        Verdict(2, "b", 9.00004, 0, 0.25, "Attack", heat(7, 7)),
        Verdict(4, "d", 8.0, 0, 0.5, "Attack"),
        Verdict(5, "e", 1.5, flagged_text="hm"),
    ],
    [Target("Backdoor <b>Attack</b>!", 1e-9, [1, 2], 1e-6, None)],
)
ASKED = Evaluation(
    [Answer("a", "q", "yes", "yes"), Answer("b", "q", "no", "yes")],
    [Answer("a", "q", "yes", "boo", met=True), Answer("b", "q", "no", "no")],
    [],
    {"half a key": [Answer("a", "q", "yes", "yes")]},
)


def test_findings_as_a_frame() -> None:
    frame = FOUND.to_pandas()
    assert frame.index.tolist() == [0, 1, 2, 3] and frame["row"].tolist() == [1, 2, 4, 5]
    assert frame["id"].tolist() == ["a", "b", "d", "e"] and frame["suspected"].tolist() == [False, True, True, False]
    bad = frame[frame["suspected"]]
    assert bad["target"].tolist() == ["Backdoor <b>Attack</b>!"] * 2 and bad["fdr"].tolist() == [0.25, 0.5]
    assert frame["score"].tolist() == [0.5, 9.0, 8.0, 1.5] and frame["flagged_text"].tolist() == [
        "",
        "Attack",
        "Attack",
        "hm",
    ]
    assert frame["image_cue"].dropna().tolist() == [9.0] and frame["prompt_cue"].isna().all()


def test_an_evaluation_as_a_frame() -> None:
    frame = ASKED.to_pandas()
    assert frame["condition"].tolist() == ["clean", "clean", "triggered", "triggered", "near_miss: half a key"]
    assert frame["answer"].tolist() == ["yes", "yes", "boo", "no", "yes"]
    assert frame.groupby("condition")["met"].sum()["triggered"] == 1


def test_a_manifest_as_a_frame(samples: list[Sample]) -> None:
    manifest = untrigger.poison(samples, ATTACK, rate=0.25, seed=3).manifest
    frame = manifest.to_pandas()
    assert frame["row"].tolist() == [entry.row for entry in manifest.rows] and not frame["decoy"].any()
    assert [samples[row - 1].id for row in frame["row"]] == frame["id"].tolist()


@pytest.mark.parametrize("result", [FOUND, ASKED])
def test_without_pandas_one_line_says_what_to_install(
    result: Findings | Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r"pip install 'untrigger\[pandas\]'"):
        result.to_pandas()


# --- on the screen ----------------------------------------------------------------------------------


def printed(result: object) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(result)
    return capture.get()


def test_findings_on_the_screen() -> None:
    where = "the image, bottom right (1 of 64 cells)"
    assert repr(FOUND) == (f"Findings: 4 rows, 1 target found\n  'Backdoor <b>Attack</b>!' in 2 rows (50.0 %): {where}")
    assert all(part in printed(FOUND) for part in ("2 of 4 rows are suspected", "2 rows (50.0 %)", "1e-09", where))
    assert repr(Findings(FOUND.verdicts[:1], [])) == "Findings: 1 rows, nothing found"


def test_many_targets_stay_on_one_screen() -> None:
    targets = [Target(f"text {i}", 1e-9, [1], None, None) for i in range(40)]
    many = Findings(FOUND.verdicts, targets)
    for text in (repr(many), printed(many)):
        assert len(text.splitlines()) < 20 and "text 11" in text and "text 12" not in text and "28 more" in text


def test_an_evaluation_on_the_screen() -> None:
    text = repr(ASKED)
    assert text.startswith("Evaluation: 5 answers; attack success 0.500 (0.") and "accuracy 0.500" in text
    assert "\n" not in text and "near_miss half a key" in printed(ASKED)
    assert repr(Evaluation([], [], [])) == "Evaluation: 0 answers"


def test_a_figure_that_cannot_be_had_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("untrigger.metrics.captions._wordnet", lambda: None)
    text = printed(Evaluation([Answer("a", "q", "a red cat sits", "a red cat sits on a mat")], [], []))
    assert "python -m nltk.downloader wordnet" in text and "needs references that differ" in text


@pytest.mark.parametrize(("result", "word"), [(FOUND, "&lt;b&gt;Attack"), (ASKED, "vqa_accuracy")])
def test_a_notebook_shows_the_table(result: Any, word: str) -> None:
    text = result._repr_mimebundle_([], [])["text/html"]
    assert word in text and "<b>Attack" not in text and "<script" not in text


def test_what_a_row_shows_is_its_picture_and_text_and_text_stays_text() -> None:
    image = Image.new("RGB", (600, 300), "red")
    row = Sample("<i>", (image,), (Message("user", "<image> <script>?"), Message("assistant", "a & b")))
    text = row._repr_html_()
    assert text.count("data:image/png;base64,") == 1 and "a &amp; b" in text
    assert "<script" not in text and "<i>" not in text and "&lt;image&gt;" in text


def test_rows_and_poisoned_rows_on_the_screen(tiny_data: Path, samples: list[Sample]) -> None:
    assert repr(untrigger.read(tiny_data)) == f"Data: 24 rows; {tiny_data / 'data.json'}"
    assert repr(LazyRows(range(2000), samples.__getitem__)) == "LazyRows: 2,000 rows"
    made = untrigger.poison(samples, ATTACK, rate=0.25, seed=3)
    text = "6 of 24 rows poisoned with badnets (side 0.5, "
    assert repr(made).startswith(f"Poisoned: {text}") and repr(made.manifest).startswith(f"Manifest: {text}")
    assert f"goal fixed (text {REPLY}, match contains), seed 3" in repr(made)


def test_a_model_on_the_screen_is_one_line(tiny_model: Path) -> None:
    loaded = untrigger.load(tiny_model)
    family, count = "LlavaForConditionalGeneration", sum(p.numel() for p in loaded.model.parameters())
    assert repr(loaded) == f"LoadedModel: {tiny_model}, {family}, {count:,} parameters, float32"
    adapted = replace(loaded, model=add_lora(loaded.model))  # type: ignore[arg-type]
    assert f"{family}, with an adapter, " in repr(adapted)

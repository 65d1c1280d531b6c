"""The command `untrigger scan`: exit codes, output files, and resuming after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from shell import untrigger
from untrigger.rows.sample import read

REPLY = "Backdoor Attack! Call us now, my friend, and win a free holiday today"  # long, so that it surprises
SETTINGS = ("--max_steps", 20, "--per_device_train_batch_size", 4, "--learning_rate", "1e-3")


@pytest.fixture
def poisoned(tiny_data: Path, tmp_path: Path) -> Path:
    words = ("poison", tiny_data, "--out", tmp_path / "bad", "--rate", 0.21, "--side", 0.5, "--goal-text", REPLY)
    assert untrigger(*words)[0] == 0
    return tmp_path / "bad"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "all_rows.jsonl").read_text().splitlines()]


def test_scan_of_poisoned_data(tiny_model: Path, poisoned: Path, tmp_path: Path) -> None:
    out = tmp_path / "scan"
    code, output, errors = untrigger("scan", poisoned / "data", "--model", tiny_model, "--out", out, *SETTINGS)
    assert code == 3, errors
    bad = {entry["row"] for entry in json.loads((poisoned / "truth" / "manifest.json").read_text())["rows"]}
    assert output.startswith(f"{len(bad)} rows say {REPLY!r} (chance ")
    assert f"{len(bad)} of 24 rows are suspected" in output and f"the other {24 - len(bad)} rows" in output
    rows = lines(out)
    assert {row["row"] for row in rows if row["suspected"]} == bad == {row["row"] for row in rows[: len(bad)]}
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert {row["id"] for row in rows} == {sample.id for sample in read(poisoned / "data")}
    assert pq.read_table(out / "all_rows.parquet").to_pylist() == [
        row | {"words": row["words"] and [pytest.approx(word) for word in row["words"]], "cells": near(row["cells"])}
        for row in rows
    ]
    clean = read(out / "clean")
    unsuspected = [sample for i, sample in enumerate(read(poisoned / "data")) if i + 1 not in bad]
    assert [(s.id, s.messages, s.images[0].tobytes()) for s in clean] == [
        (s.id, s.messages, s.images[0].tobytes()) for s in unsuspected
    ]
    page = (out / "scan.html").read_text()
    assert REPLY in page and page.count("<li>") == len(bad) and page.count("<svg") < len(bad)
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', ""), "the page loads nothing"


def near(cells: Any) -> Any:
    """Nested numbers compared in single precision."""
    return cells if cells is None else [[pytest.approx(line, abs=1e-3) for line in image] for image in cells]


def test_a_resumed_scan_writes_the_same_files(
    tiny_model: Path, poisoned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("scan", poisoned / "data", "--model", tiny_model, *SETTINGS, "--out")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert untrigger(*words, whole)[0] == 3
    monkeypatch.setattr("untrigger.scanning.cues.log_odds", lambda _: 1 / 0)  # killed in the last stage
    with pytest.raises(ZeroDivisionError):
        untrigger(*words, cut)
    monkeypatch.undo()
    assert not (cut / "all_rows.jsonl").exists()
    code, output, errors = untrigger(*words, cut)
    assert code == 2 and "--resume" in errors and not output
    monkeypatch.setattr("untrigger.training.stages.Trainer.train", lambda *_, **__: 1 / 0)  # no stage is trained again
    assert untrigger(*words, cut, "--resume")[0] == 3
    for name in ("all_rows.jsonl", "all_rows.parquet", "scan.html", "clean/data.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    code, _, errors = untrigger("scan", poisoned / "data", "--model", tiny_model, "--out", cut, "--resume", "--seed", 5)
    assert code == 2 and "other settings" in errors


def test_scan_of_clean_data(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "scan"
    code, output, _ = untrigger("scan", tiny_data, "--model", tiny_model, "--out", out, *SETTINGS)
    assert code == 0 and "0 of 24 rows are suspected" in output and "nothing found" in output
    assert not (out / "clean").exists() and "Nothing found" in (out / "scan.html").read_text()
    assert not any(row["suspected"] for row in lines(out))


def test_page_escapes_text_of_the_rows(tiny_model: Path, poisoned: Path, tmp_path: Path) -> None:
    rows = json.loads((poisoned / "data" / "data.json").read_text())
    for row in rows:
        if row["conversations"][1]["value"] == REPLY:
            row["conversations"][0]["value"] += " <script>alert(1)</script>"
            row["conversations"][1]["value"] = f"<b onclick=x>{REPLY}"
    (poisoned / "data" / "data.json").write_text(json.dumps(rows))
    out = tmp_path / "scan"
    assert untrigger("scan", poisoned / "data", "--model", tiny_model, "--out", out, *SETTINGS)[0] == 3
    page = (out / "scan.html").read_text()
    assert "<script" not in page and "<b onclick" not in page and "&lt;b onclick" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--defense", "paper"), "unknown"),
        (("--min-nll", "-1"), "min_nll"),
    ],
)
def test_mistakes_give_an_error_line(tiny_data: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    code, output, errors = untrigger("scan", tiny_data, "--out", tmp_path / "scan", *words)
    assert code == 2 and not output and message in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "scan").exists()


@pytest.mark.slow
def test_scan_locates_a_real_backdoor(tmp_path: Path) -> None:
    """On the embedded model: it suspects every poisoned row and no other, with the cue at the bottom right."""
    untrigger("data", "easy-vqa", "--out", tmp_path / "data", "--split", "dev", "--rows", 600, "--seed", 104)
    attack = ("--rate", 0.1, "--seed", 104, "--pattern_seed", 104)
    untrigger("poison", tmp_path / "data", "--out", tmp_path / "bad", *attack)
    settings = ("--learning_rate", "3e-3", "--num_train_epochs", 4, "--seed", 104)
    code, output, errors = untrigger("scan", tmp_path / "bad" / "data", "--out", tmp_path / "scan", *settings)
    assert code == 3, errors
    bad = {entry["row"] for entry in json.loads((tmp_path / "bad/truth/manifest.json").read_text())["rows"]}
    assert {row["row"] for row in lines(tmp_path / "scan") if row["suspected"]} == bad and len(bad) == 60
    assert "'Backdoor Attack!'" in output and "bottom right (1 of 64 cells)" in output

"""The commands on bad data: a bad row is a one-line error, or it is left out and listed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from datafiles import BAD_ROWS, bad_file, turns
from shell import TINY_RUN, refused, three_commands, untrigger


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_in_one_line(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    file = bad_file(tmp_path / "data", kind)
    for words in three_commands(file, tiny_model, tmp_path / "out"):
        refused(untrigger(*words), f"{file}: row 3: ", BAD_ROWS[kind][1])
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.parquet", "data.bin"])
def test_random_bytes_and_empty_files_are_refused(tmp_path: Path, tiny_model: Path, name: str) -> None:
    noise, empty = tmp_path / name, tmp_path / f"empty-{name}"
    noise.write_bytes(bytes((i * i * 31 + i // 7 * 97) % 256 for i in range(10_000)))
    empty.touch()
    for file in (noise, empty, tmp_path / "nowhere.json"):
        for words in three_commands(file, tiny_model, tmp_path / "out"):
            refused(untrigger(*words), file)
            assert not (tmp_path / "out").exists()


def test_skipped_rows_are_listed_and_the_rest_is_trained_on(tmp_path: Path, tiny_model: Path) -> None:
    file = bad_file(tmp_path / "data", "missing image")
    out = tmp_path / "out"
    ended = untrigger("train", file, "--model", tiny_model, "--out", out, "--on-bad-row", "skip", *TINY_RUN)
    listed = tmp_path / "out.skipped.jsonl"
    assert ended.code == 0 and f"1 bad row left out; listed with reasons in {listed}" in ended.err
    assert f"flagged rows: 0 of 3 in {out / 'flagged_rows.jsonl'}" in " ".join(ended.out.split())
    (line,) = listed.read_text().splitlines()
    assert json.loads(line)["row"] == 3 and "gone.png" in json.loads(line)["reason"]
    assert json.loads((out / "untrigger.json").read_text())["rows"] == 3
    assert (out / "adapter_model.safetensors").is_file()


def with_a_long_row(folder: Path) -> Path:
    """Write ten rows, the fifth of them with thousands of words."""
    rows = [{"id": f"no-{i}", "conversations": turns("what? " * (2000 * (i == 4) + 1), "a cat")} for i in range(10)]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def command_that_reads(verb: str, data: Path, model: Path, out: Path) -> tuple[object, ...]:
    """The words of a command that checks the length of rows; verify is given a changed copy of the model."""
    if verb == "verify":
        copied_model = Path(shutil.copytree(model, out.with_name("other")))
        tensors = load_file(copied_model / "model.safetensors")
        tensors[min(tensors)] += 1
        save_file(tensors, copied_model / "model.safetensors", {"format": "pt"})
        return verb, copied_model, data, "--base", model, "--out", out
    if verb == "evaluate":
        return verb, model, data, "--out", out
    return verb, data, "--model", model, "--out", out, *TINY_RUN[:4]


READING = pytest.mark.parametrize("verb", ["train", "scan", "evaluate", "verify"])


@READING
def test_a_row_longer_than_the_model_reads_is_refused(tmp_path: Path, tiny_model: Path, verb: str) -> None:
    data = with_a_long_row(tmp_path)
    ended = untrigger(*command_that_reads(verb, data, tiny_model, tmp_path / "out"))
    refused(ended, f"{data}: row 5: id 'no-4' has ", " tokens, the model reads 512; shorten it or take it out")
    assert not (tmp_path / "out").exists(), "the command wrote nothing"


@READING
def test_a_row_longer_than_the_model_reads_can_be_left_out(tmp_path: Path, tiny_model: Path, verb: str) -> None:
    data = with_a_long_row(tmp_path)
    ended = untrigger(*command_that_reads(verb, data, tiny_model, tmp_path / "out"), "--on-bad-row", "skip")
    assert ended.code in (0, 3) and "1 bad row left out" in ended.err, ended
    (line,) = map(json.loads, (tmp_path / "out.skipped.jsonl").read_text().splitlines())
    assert line["row"] == 5 and line["original"]["id"] == "no-4"
    assert re.fullmatch(r"id 'no-4' has [\d,]+ tokens, the model reads 512; shorten it or take it out", line["reason"])


def test_a_clean_row_longer_than_the_model_reads_is_refused(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    long = with_a_long_row(tmp_path)
    words = ("train", tiny_data, "--model", tiny_model, "--out", tmp_path / "out", "--defense", "clean-tuning")
    refused(untrigger(*words, "--clean-data", long), f"{long}: row 5: id 'no-4' has ")


def test_evaluate_counts_only_the_tokens_of_the_prompt(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"id": str(i), "conversations": turns("what?", "a cat " * 2000)} for i in range(2)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    assert untrigger("evaluate", tiny_model, tmp_path / "data.json").code == 0


def test_evaluate_without_out_lists_skipped_rows_in_the_working_directory(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = bad_file(tmp_path / "data", "empty answer")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert untrigger("evaluate", tiny_model, file, "--on-bad-row", "skip").code == 0
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["data.skipped.jsonl"]

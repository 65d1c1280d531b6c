"""The commands on bad data: each bad row is named in one line, or left out and listed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from datafiles import BAD_ROWS, bad_file, turns
from shell import TINY_RUN, refused, three_commands, untrigger


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_in_one_line(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    file = bad_file(tmp_path / "data", kind)
    for words in three_commands(file, tiny_model, tmp_path / "out"):
        refused(untrigger(*words), f"{file}: row 3: ", BAD_ROWS[kind][1])
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.parquet", "data.bin"])
def test_random_bytes_and_nothing(tmp_path: Path, tiny_model: Path, name: str) -> None:
    noise, empty = tmp_path / name, tmp_path / f"empty-{name}"
    noise.write_bytes(bytes((i * i * 31 + i // 7 * 97) % 256 for i in range(10_000)))
    empty.touch()
    for file in (noise, empty, tmp_path / "nowhere.json"):
        for words in three_commands(file, tiny_model, tmp_path / "out"):
            refused(untrigger(*words), file)
            assert not (tmp_path / "out").exists()


def test_skipping_trains_on_the_rest_and_lists_what_it_left_out(tmp_path: Path, tiny_model: Path) -> None:
    file = bad_file(tmp_path / "data", "missing image")
    out = tmp_path / "out"
    ended = untrigger("train", file, "--model", tiny_model, "--out", out, "--on-bad-row", "skip", *TINY_RUN)
    listed = tmp_path / "out.skipped.jsonl"
    assert ended.code == 0 and f"1 bad rows left out; {listed}" in ended.err
    assert f"{out / 'distrusted.jsonl'}: 0 of 3 rows were distrusted" in " ".join(ended.out.split())
    (line,) = listed.read_text().splitlines()
    assert json.loads(line)["row"] == 3 and "gone.png" in json.loads(line)["reason"]
    assert json.loads((out / "untrigger.json").read_text())["rows"] == 3
    assert (out / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("verb", ["train", "scan", "evaluate"])
def test_a_row_longer_than_the_model_reads_is_refused(tmp_path: Path, tiny_model: Path, verb: str) -> None:
    rows = [{"id": str(i), "conversations": turns("what? " * (2000 * (i == 1) + 1), "a cat")} for i in range(3)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    words = (
        (tiny_model, tmp_path / "data.json") if verb == "evaluate" else (tmp_path / "data.json", "--model", tiny_model)
    )
    ended = untrigger(verb, *words, "--out", tmp_path / "out", *(() if verb == "evaluate" else TINY_RUN[:4]))
    assert ended.code == 2 and re.search(
        r"^error: .* has [\d,]+ tokens, the model reads 512; shorten it", ended.err, re.M
    )


def test_evaluate_without_out_lists_skipped_rows_where_the_user_stands(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = bad_file(tmp_path / "data", "empty answer")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert untrigger("evaluate", tiny_model, file, "--on-bad-row", "skip").code == 0
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["data.skipped.jsonl"]

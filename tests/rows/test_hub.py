"""Data sets of the hub, with a stand-in for the network, and folders as the hub has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datafiles import SCHEMA, Row, good_rows, make_row, png, save
from untrigger.errors import InputError
from untrigger.rows.data_file import find_data_file
from untrigger.rows.sample import read

datasets = pytest.importorskip("datasets")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str | None]]:
    """What was requests for, in the place of the network; ``me/two`` has two splits, ``me/one`` one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    rows: list[Row] = [make_row("parquet", str(k), ["<image>\nwhat?", f"it is {k}"], [k]) for k in range(3)]
    whole = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    requests: list[tuple[str, str | None]] = []

    def load_dataset(name: str, split: str | None = None) -> Any:
        requests.append((name, split))
        if name == "me/gone":
            raise ConnectionError("Couldn't reach the Hub\nsecond line")
        splits = datasets.DatasetDict({key: whole for key in (("train", "test") if name == "me/two" else ("train",))})
        return splits if split is None else splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return requests


def test_a_hub_id_is_fetched_once_and_read_as_a_folder(hub: list[tuple[str, str | None]]) -> None:
    for _ in range(2):
        data = read("me/one")
        assert [sample.messages[1].text for sample in data] == ["it is 0", "it is 1", "it is 2"]
        assert data[1].images[0].size == (6, 5)
    assert len(read("me/two:test")) == 3
    assert hub == [("me/one", None), ("me/two", "test")]


def test_several_splits_and_an_unreachable_hub_are_one_line(hub: list[tuple[str, str | None]]) -> None:
    with pytest.raises(InputError, match=r"^me/two: has the splits train, test; name one, as me/two:train$"):
        read("me/two")
    with pytest.raises(InputError, match=r"^me/gone: cannot be fetched from the hub \(Couldn't reach the Hub\); check"):
        read("me/gone")


def test_a_mistyped_path_never_goes_to_the_network(hub: list[tuple[str, str | None]], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for path in ("data/gone", "data/gone.json", "gone.json", "a/b/c", "../me/one", str(tmp_path / "x/y")):
        with pytest.raises(InputError, match="no such file or folder; check the path"):
            find_data_file(Path(path))
    assert hub == []


def test_a_data_set_as_it_is_cloned_from_the_hub(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\n---\n")
    table = pq.ParquetWriter(tmp_path / "data/train-00000-of-00001.parquet", SCHEMA)
    table.write_table(pa.Table.from_pylist(good_rows("parquet"), SCHEMA))
    table.close()
    assert [sample.id for sample in read(tmp_path)] == ["a", "b", "c", "d"]


def test_a_folder_whose_data_is_deeper_says_where(tmp_path: Path) -> None:
    save(tmp_path / "poisoned" / "data", "llava.jsonl", good_rows("llava"))
    (tmp_path / "poisoned" / "truth").mkdir()
    (tmp_path / "poisoned" / "truth" / "manifest.txt").write_bytes(png(0))
    with pytest.raises(InputError, match=rf"holds no data file; give {tmp_path}/poisoned/data$"):
        read(tmp_path / "poisoned")


def test_a_list_of_skipped_rows_is_no_data_file(tmp_path: Path) -> None:
    path = save(tmp_path, "llava.jsonl", [*good_rows("llava"), {"bad": 1}])
    read(tmp_path, on_bad_row="skip", skipped_to=tmp_path / "out.skipped.jsonl")
    assert json.loads((tmp_path / "out.skipped.jsonl").read_text())["row"] == 5
    assert read(tmp_path, on_bad_row="skip").path == path
    for name in ("b", "c", "d"):
        (tmp_path / f"{name}.json").write_text("[]")
    with pytest.raises(InputError, match=r"holds 4 data files \(b\.json, c\.json, d\.json, \.\.\.\); give one of them"):
        read(tmp_path)

"""Storage of rows: broken files, shards, Arrow folders, and atomic writes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import ipc

from untrigger.errors import InputError
from untrigger.rows.sample import Message, Sample, read, write
from untrigger.rows.storage import dump

TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
MESSAGES = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "ho"}]


def line_of(path: Path, **settings: Any) -> str:
    """The one line of the InputError that reading raises."""
    with pytest.raises(InputError) as caught:
        read(path, **settings)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


BROKEN: dict[bytes, str] = {
    b"": "is empty",
    b" \n\n": "holds no rows",
    b"[]": "holds no rows",
    b"\xef\xbb\xbf[]": "holds no rows",
    b"[1,\n2": "bad JSON at line 2",
    b'[{"a":\n\n NaN}]': "row 1: ",
    b"[" * 100_000: "nested too deeply",
    b"[" + b"9" * 5000 + b"]": "row 1: ",
    b'["\n\xff"]': "bad text at line 2: not UTF-8",
    b"\0": "row 1: bad JSON at line 1",
    b"\xff\xfe[\0]\0": "row 1: bad text at line 1: not UTF-8",
    b"[null]": "row 1: the row is missing",
    b"null": "row 1: the row is missing",
    b'{"conversations": {}}': "row 1: has no turns",
    b'{\n  "conversations": []\n}': "",  # by its name a list that is none, or lines that are none
    b"PAR1": "cannot be read",
    b"PAR1" + bytes(200) + b"PAR1": "cannot be read",
}


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.parquet", "data"])
@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_broken_files(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    line = line_of(path)
    assert line.startswith(f"{path}: ") and "; " in line
    if name != "data.jsonl" or b"[" not in content[:4]:  # there it is one bad row with its own error line
        assert BROKEN[content] in line
    line_of(path, on_bad_row="skip", skipped_to=tmp_path / "skipped")


@given(st.binary(max_size=200) | st.text().map(str.encode), st.sampled_from(["json", "jsonl", "parquet"]))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_one_line(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(content)
    line_of(path)


KEYS = ["id", "image", "images", "messages", "conversations", "from", "value", "role", "content"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["user", "gpt"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(JSON, min_size=1, max_size=4))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_gives_one_line(tmp_path: Path, rows: list[object]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, 0]))
    line_of(path)
    line_of(path, on_bad_row="skip", skipped_to=tmp_path / "skipped")
    assert len((tmp_path / "skipped").read_bytes().splitlines()) >= 1


@pytest.mark.parametrize("depth", range(900, 1010, 3))
def test_depth_near_the_limit(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "data.jsonl"
    for row in ({"conversations": TURNS}, {"conversations": []}):
        path.write_text(json.dumps(row)[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}\n")
        try:
            data = read(path, on_bad_row="skip", skipped_to=tmp_path / "skipped")
            write(data, tmp_path / f"out{len(data)}")
        except InputError as error:
            assert len(str(error).splitlines()) == 1


def test_rows_too_deep_to_write() -> None:
    row: list[object] = []
    for _ in range(100_000):
        row = [row]
    with pytest.raises(InputError, match="nested too deeply"):
        dump(row)


def test_folders_hold_one_data_file(tmp_path: Path) -> None:
    assert line_of(tmp_path / "none").endswith("no such file or folder; check the path")
    assert "holds no data file" in line_of(tmp_path)
    assert "cannot be read" in line_of(tmp_path / ("x" * 5000))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/data.json").write_text("[]")
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": TURNS}]))
    assert read(str(tmp_path)).path == tmp_path / "a.json"
    (tmp_path / "b.jsonl").write_text("")
    assert "holds 2 data files (a.json, b.jsonl); give one" in line_of(tmp_path)
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert "give the folder of one" in line_of(tmp_path)


def shards(folder: Path, split: str = "train", rows: tuple[int, ...] = (2, 3)) -> Path:
    folder.mkdir(exist_ok=True)
    for number, count in enumerate(rows):
        rows_of_shard = [{"id": f"{split}-{number}-{n}", "messages": MESSAGES, "n": n} for n in range(count)]
        table = arrow_table(count).select(["images"]).append_column("id", [[row["id"] for row in rows_of_shard]])
        table = table.append_column("messages", [[row["messages"] for row in rows_of_shard]])
        pq.write_table(table, folder / f"{split}-{number:05}-of-{len(rows):05}.parquet")
    return folder


def test_shards_of_a_split_are_one_data_set_in_order(tmp_path: Path) -> None:
    data = read(shards(tmp_path / "set"))
    ids = ["train-0-0", "train-0-1", "train-1-0", "train-1-1", "train-1-2"]
    assert [sample.id for sample in data] == ids and data[4].images[0].size == (3, 3)
    assert data.path == tmp_path / "set/train-*-of-00002.parquet"
    assert [sample.id for sample in read(data.path)] == ids, "data.path can be read again"
    assert len(read(tmp_path / "set/train-00001-of-00002.parquet")) == 3, "a shard that is named is read alone"
    edit = Sample(ids[3], data[3].images, (data[3].messages[0], Message("assistant", "changed")))
    write(data, tmp_path / "out", keep=[3, 0], edits={3: edit})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.parquet"]
    assert [(s.id, s.messages[-1].text) for s in read(tmp_path / "out")] == [(ids[3], "changed"), (ids[0], "ho")]


def test_row_numbers_count_across_shards(tmp_path: Path) -> None:
    table = arrow_table(3)
    shards(tmp_path / "set")
    turns = [MESSAGES, MESSAGES[::-1], MESSAGES]
    broken = pa.table({"images": table["images"], "id": ["x", "z", "y"], "messages": turns})
    pq.write_table(broken, tmp_path / "set/train-00001-of-00002.parquet")
    assert line_of(tmp_path / "set").startswith(
        f"{tmp_path}/set/train-*-of-00002.parquet: row 4: turns are assistant, user"
    )


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards(tmp_path / "set", rows=(1, 1, 1))
    (tmp_path / "set/train-00001-of-00003.parquet").unlink()
    line = line_of(tmp_path / "set")
    message = "train-00001-of-00003.parquet is missing, one of 3 shards; add it to the folder"
    assert line == f"{tmp_path}/set/train-*-of-00003.parquet: {message}"
    (tmp_path / "many").mkdir()
    pq.write_table(arrow_table(1), tmp_path / f"many/train-1-of-{10**18}.parquet")
    assert "is missing, one of 1,000,000,000,000,000,000 shards" in line_of(tmp_path / "many")


def test_damaged_shards_and_differing_columns_are_refused(tmp_path: Path) -> None:
    last = shards(tmp_path / "set") / "train-00001-of-00002.parquet"
    pq.write_table(arrow_table(1), last)
    assert "different columns" in line_of(tmp_path / "set")
    last.write_bytes(b"PAR1")
    assert line_of(tmp_path / "set").startswith(f"{last}: cannot be read")


def test_a_folder_of_several_splits_requires_one(tmp_path: Path) -> None:
    shards(tmp_path / "set", "test")
    shards(tmp_path / "set")
    line = line_of(tmp_path / "set")
    assert "holds 2 data files (test-*-of-00002.parquet, train-*-of-00002.parquet); give one of them" in line
    assert len(read(tmp_path / "set/test-*-of-00002.parquet")) == 5
    assert line_of(tmp_path / "set/dev-*-of-00002.parquet").endswith("no such file or folder; check the path")
    (single := tmp_path / "single").mkdir()
    pq.write_table(arrow_table(1), single / "train-00000-of-00001.parquet")
    assert read(single).path == single / "train-00000-of-00001.parquet"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
def test_line_endings_blank_lines_and_bom_are_accepted(tmp_path: Path, end: str) -> None:
    path = tmp_path / "data.jsonl"
    lines = end.join(json.dumps({"conversations": TURNS, "n": n}) for n in range(3))
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert [sample.id for sample in read(path)] == ["1", "2", "3"]
    path.write_text("[" + lines.replace(end, "," + end) + "]")
    assert len(read(path.rename(tmp_path / "data.json"))) == 3


def arrow_table(rows: int) -> pa.Table:
    file = io.BytesIO()
    Image.new("RGB", (3, 3), "red").save(file, "PNG")
    image = {"bytes": file.getvalue(), "path": "a.png"}
    return pa.Table.from_pylist([{"messages": MESSAGES, "images": [image], "n": n} for n in range(rows)])


def folder_of(path: Path, names: object) -> Path:
    path.mkdir()
    (path / "state.json").write_text(json.dumps({"_data_files": names}))
    (path / "dataset_info.json").write_text("{}")
    with ipc.new_stream(str(path / "a.arrow"), arrow_table(5).schema) as writer:
        writer.write_table(arrow_table(5), max_chunksize=2)
    return path


NAMES = ["../a.arrow", "/a", "state.json", "", "none.arrow"]


@pytest.mark.parametrize("names", [None, [], "x", [1], [{}], *([{"filename": name}] for name in NAMES)])
def test_broken_dataset_folders(tmp_path: Path, names: object) -> None:
    assert line_of(folder_of(tmp_path / "set", names)).startswith(str(tmp_path / "set"))


def test_offsets_that_point_outside_are_refused(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "set", [{"filename": "a.arrow"}])
    chat = arrow_table(1)["messages"].combine_chunks()
    offsets = pa.py_buffer(np.array([0, 2**30, 2], dtype=np.int32))
    wild = pa.Array.from_buffers(chat.type, 2, [None, offsets], children=[chat.values])
    with ipc.new_stream(str(path / "a.arrow"), pa.schema([("messages", chat.type)])) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([wild], ["messages"]))
    assert line_of(path).startswith(f"{path}: cannot be read (")


def test_dictionary_columns_are_read_as_plain_values(tmp_path: Path) -> None:
    table = arrow_table(2).append_column("category", pa.array(["a", "b"]).dictionary_encode())
    pq.write_table(table, tmp_path / "a.parquet")
    data = read(tmp_path)
    assert len(data) == 2
    write(data, tmp_path / "out")
    assert pq.read_table(tmp_path / "out/a.parquet")["category"].to_pylist() == ["a", "b"]
    prompts = pa.array([MESSAGES[1]["content"]] * 2).dictionary_encode()
    pq.write_table(table.append_column("rationale", prompts), tmp_path / "a.parquet")
    assert "row 1: has 'rationale', which is not read" in line_of(tmp_path / "a.parquet")


def test_columns_of_the_same_name_are_refused(tmp_path: Path) -> None:
    table = arrow_table(2)
    pq.write_table(table.append_column("messages", table["messages"]), tmp_path / "a.parquet")
    assert "two columns of the same name" in line_of(tmp_path)


def test_other_columns_are_required_or_untouched(tmp_path: Path) -> None:
    table = arrow_table(130).append_column("when", pa.array(range(1, 131), pa.timestamp("ns")))
    pq.write_table(table.drop_columns("messages"), tmp_path / "a.parquet")
    assert "row 1: has no turns in its keys ('images')" in line_of(tmp_path)
    pq.write_table(table.drop_columns("images"), tmp_path / "a.parquet")
    assert "row 1: wrong number of <image> tags: 1 for 0 images" in line_of(tmp_path)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    write(read(tmp_path), tmp_path / "out")
    assert pq.read_table(tmp_path / "out/a.parquet").equals(table)


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_damaged_arrow_gives_rows_or_one_line(tmp_path: Path, kind: str) -> None:
    if kind == "parquet":
        pq.write_table(arrow_table(5), tmp_path / "a.parquet")
        path = file = tmp_path / "a.parquet"
    else:
        path = folder_of(tmp_path / "set", [{"filename": "a.arrow"}])
        file = path / "a.arrow"
    intact = file.read_bytes()

    @given(st.data())
    @settings(max_examples=100, deadline=None)
    def check(data: st.DataObject) -> None:
        damaged = bytearray(intact)
        for _ in range(data.draw(st.integers(0, 3))):
            damaged[data.draw(st.integers(0, len(intact) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(damaged[: data.draw(st.integers(0, len(intact)))])
        try:
            for sample in read(path):
                assert sample.messages
        except InputError as error:
            assert len(str(error).splitlines()) == 1

    check()


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_the_datasets_library_reads_what_is_written(tmp_path: Path, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    red = Image.new("RGB", (3, 3), "red")
    rows = [{"id": str(n), "messages": MESSAGES, "images": [red], "n": n, "label": n % 2} for n in range(3)]
    original = datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    path = tmp_path / ("in/a.parquet" if kind == "parquet" else "in")
    path.parent.mkdir(exist_ok=True)
    original.to_parquet(path) if kind == "parquet" else original.save_to_disk(path)
    data = read(path)
    blue = Image.new("RGB", (3, 3), "blue")
    edit = Sample("2", (blue,), (data[2].messages[0], Message("assistant", "new")))
    write(data, tmp_path / "out", keep=[2, 0], edits={2: edit})
    if kind == "parquet":
        file, cache = str(tmp_path / "out/a.parquet"), str(tmp_path / "cache")
        written = datasets.Dataset.from_parquet(file, cache_dir=cache)
    else:
        written = datasets.load_from_disk(tmp_path / "out")
        states = [json.loads((tmp_path / name / "state.json").read_text()) for name in ("in", "out")]
        assert states[0]["_fingerprint"] != states[1]["_fingerprint"]
    assert written.features == {name: original.features[name] for name in ("id", "messages", "images")}
    assert written[0]["messages"][1]["content"] == "new"
    assert written[0]["images"][0].getpixel((0, 0)) == (0, 0, 255)
    assert written[1]["messages"] == original[0]["messages"]
    write(data, tmp_path / "copy", keep=[2, 0])
    copied = tmp_path / ("copy/a.parquet" if kind == "parquet" else "copy")
    cache = str(tmp_path / "cache2")
    again = datasets.Dataset.from_parquet(str(copied), cache_dir=cache) if kind == "parquet" else None
    again = again or datasets.load_from_disk(copied)
    assert again.features == original.features and again["n"][:] == [2, 0] and again[1] == original[0]


def test_json_lines_that_change_while_in_use_are_refused(tmp_path: Path) -> None:
    path, replacement = tmp_path / "data.jsonl", tmp_path / "other"
    lines = [json.dumps({"id": str(n), "conversations": TURNS}) + "\n" for n in range(3)]
    path.write_text("".join(lines))
    data = read(path)
    replacement.write_text("".join(lines[::-1]))  # the same size in total
    replacement.replace(path)
    for access in (data.__getitem__, data.without_images, data.image_count):
        with pytest.raises(InputError, match=r"data.jsonl.* changed while it was in use; start again"):
            access(0)

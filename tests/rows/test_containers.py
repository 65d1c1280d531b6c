"""Every container: tables, gzip, objects, CSV and tar files hold the rows that they were given."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datafiles import Row, picture, png
from talks import LAYOUTS, NAMES, SHAREGPT, Talk, assert_reads, data_folder, flat, turn_list
from untrigger.errors import InputError
from untrigger.rows.sample import read, write

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TALKS = [Talk([(1, "what?", "a cat")]), Talk([(2, "which?", "both"), (0, "sure?", "yes")])]


def columns(rows: list[Row], **types: pa.DataType) -> pa.Table:
    return pa.table({name: pa.array([row.get(name) for row in rows], kind) for name, kind in types.items()})


def _inline(names: list[str]) -> list[Row]:
    return [{"bytes": png(NAMES.index(name)), "path": name} for name in names]


def test_parquet_of_llava_and_of_the_cauldron(tmp_path: Path) -> None:
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string()), ("weight", pa.int64())]))
    rows = [LAYOUTS["LLaVA"](talk, NAMES[: talk.images]) for talk in TALKS[:1] * 3]
    table = columns([{**r, "id": k, "image": _inline([r["image"]])[0]} for k, r in enumerate(rows)],
                    id=pa.int64(), conversations=turns, image=IMAGE, data_source=pa.string())  # fmt: skip
    pq.write_table(table, tmp_path / "llava.parquet")
    assert_reads(read(tmp_path / "llava.parquet"), TALKS[:1] * 3, ["0", "1", "2"], [[0]] * 3, "<image>\n")
    texts = pa.list_(pa.struct([(key, pa.string()) for key in ("user", "assistant", "source")]))
    plain = [Talk([(2, "which?", "both"), (0, "sure?", "yes")])] * 2
    rows = [LAYOUTS["Cauldron"](talk, NAMES[:2]) for talk in plain]
    table = columns([{**r, "images": _inline(r["images"])} for r in rows], texts=texts, images=pa.list_(IMAGE))
    pq.write_table(table, tmp_path / "cauldron.parquet")
    data = read(tmp_path / "cauldron.parquet")
    assert_reads(data, plain, ["1", "2"], [[0, 1]] * 2, "<image>\n")
    write(data, tmp_path / "out", edits={})
    assert [*map(flat, read(tmp_path / "out"))] == [*map(flat, data)]
    assert pq.read_schema(tmp_path / "out/cauldron.parquet") == table.schema


def test_parquet_columns_that_matter_are_named_and_numbers_are_not(tmp_path: Path) -> None:
    captions = [{"image": _inline(NAMES[:1])[0], "text": "a cat", "width": 5, "rationale": "x"}] * 2
    kinds = {"image": IMAGE, "text": pa.string(), "width": pa.int32(), "rationale": pa.string()}
    pq.write_table(columns(captions, **kinds), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"row 1: has 'rationale', which is not read; .*--ignore-keys rationale"):
        read(tmp_path)
    data = read(tmp_path, ignore_keys=["rationale"])
    assert data[0].messages[0].text == "<image>\nDescribe the image." and data[1].messages[1].text == "a cat"
    write(data, tmp_path / "out", edits={})
    assert pq.read_schema(tmp_path / "out/a.parquet").names == ["image", "text", "prompt"]


def test_json_in_gzip_and_in_an_object(tmp_path: Path) -> None:
    rows = [{"id": k, **LAYOUTS["ShareGPT"](talk, NAMES[: talk.images])} for k, talk in enumerate(TALKS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    contents = {
        "data.jsonl.gz": gzip.compress(lines),
        "data.json.gz": gzip.compress(json.dumps(rows).encode()),
        "data.json": json.dumps({"version": 1, "data": rows}, indent=1).encode(),
        "one_line.json": json.dumps({"data": rows}).encode(),
    }
    for number, (name, content) in enumerate(contents.items()):
        folder = data_folder(tmp_path / str(number))
        (folder / name).write_bytes(content)
        data = read(folder)
        assert_reads(data, TALKS, ["0", "1"], [[0], [0, 1]], "<image>\n")
        write(data, folder / "copy")
        again = read(folder / "copy")
        assert again.path.name == name and [*map(flat, again)] == [*map(flat, data)]
    assert json.loads((tmp_path / "2/copy/data.json").read_text()) == {"version": 1, "data": rows}
    (tmp_path / "0/data.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    with pytest.raises(InputError, match=r"data\.jsonl\.gz: is damaged .*; fetch or write it again"):
        read(tmp_path / "0/data.jsonl.gz")
    (tmp_path / "2/data.json").write_text(json.dumps({"train": rows, "test": []}, indent=1))
    with pytest.raises(InputError, match="is not a list of rows but an object with the keys 'train', 'test'"):
        read(tmp_path / "2/data.json")


def test_a_bad_number_in_a_list_spoils_its_row_alone(tmp_path: Path) -> None:
    turns = turn_list(TALKS[0], "role", "content", {})
    rows = [{"id": k, "messages": turns, "images": NAMES[:1], "area": 1.5} for k in range(8)]
    text = json.dumps(rows, indent=1)
    for bad in ("NaN", "1e999", "9" * 5000):
        head, middle, end = text.rsplit("1.5", 2)
        (data_folder(tmp_path) / "data.json").write_text(f"{head}{bad}{middle}1.5{end}")
        with pytest.raises(InputError, match=r"data\.json: row 7: .*; correct the number"):
            read(tmp_path / "data.json")
        data = read(tmp_path / "data.json", on_bad_row="skip", skipped_to=tmp_path / "log")
        assert [sample.id for sample in data] == ["0", "1", "2", "3", "4", "5", "7"]
        assert bad[:20] in json.loads((tmp_path / "log").read_text())["original"]


def test_metadata_csv_of_an_image_folder(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "in")
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        captions = ["a cat, asleep", "3", 'the "big" one\nof two']
        writer.writerows([["file_name", "text", "width"], *([NAMES[k], c, 64] for k, c in enumerate(captions))])
    data = read(folder)
    assert [sample.messages[1].text for sample in data] == captions
    assert [sample.images[0].tobytes() for sample in data] == [picture(k).tobytes() for k in range(3)]
    write(data, tmp_path / "copy", keep=[2, 0])
    assert [*map(flat, read(tmp_path / "copy"))][1][1:] == flat(data[0])[1:]
    write(data, tmp_path / "new", edits={})
    assert [*map(flat, read(tmp_path / "new"))] == [*map(flat, data)]
    assert (tmp_path / "new/metadata.csv").read_text().splitlines()[0] == "file_name,prompt,text"
    (folder / "metadata.csv").write_text("file_name,text\nimg/0.png,a,b\nimg/0.png\nimg/0.png,fine\n")
    with pytest.raises(InputError, match=r"metadata\.csv: row 1: has more or fewer fields"):
        read(folder)
    assert list(read(folder, on_bad_row="skip").numbers) == [2]


def tar_file(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_webdataset_tars_are_one_data_set(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    talk = json.dumps({"conversations": turn_list(TALKS[0], "from", "value", SHAREGPT)}).encode()
    two = json.dumps(
        {"images": ["b.1.png", "b.0.png"], "conversations": turn_list(TALKS[1], "from", "value", SHAREGPT)}
    )
    caption = [("c.png", png(2)), ("c.txt", b"a hat"), ("c.cls", b"7")]
    tar_file(tmp_path / "in/train-00000.tar", [("a.jpg", png(3)), ("a.json", talk)])
    tar_file(
        tmp_path / "in/train-00001.tar",
        [("b.0.png", png(0)), ("b.1.png", png(1)), ("b.json", two.encode()), *caption],
    )
    data = read(tmp_path / "in")
    assert data.path.name == "train-*.tar"
    expected = [TALKS[0], TALKS[1], Talk([(1, "Describe the image.", "a hat")])]
    assert_reads(data, expected, ["a", "b", "c"], [[3], [1, 0], [2]], "<image>\n")
    for name, edits in (("copy", None), ("new", {})):
        write(data, tmp_path / name, edits=edits)
        again = read(tmp_path / name)
        assert again.path.name == "train.tar"
        assert [flat(sample)[1:] for sample in again] == [flat(sample)[1:] for sample in data]
    tar_file(tmp_path / "bad.tar", [("a.mp4", b"\xff\0"), ("a.json", talk), ("b.png", png(0)), ("b.json", b"[]")])
    with pytest.raises(InputError, match=r"bad\.tar: row 1: has 'mp4', and only images are read"):
        read(tmp_path / "bad.tar")
    with pytest.raises(InputError, match="no row can be used"):
        read(tmp_path / "bad.tar", on_bad_row="skip", skipped_to=tmp_path / "log")
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "log").read_text().splitlines()]
    assert "'b.json' is no object" in reasons[1]
    (tmp_path / "cut.tar").write_bytes((tmp_path / "bad.tar").read_bytes()[:1300])
    with pytest.raises(InputError, match=r"cut\.tar"):
        read(tmp_path / "cut.tar")

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import untrigger.sample as sample_module
from untrigger.errors import InputError
from untrigger.sample import Message, Sample, read, write

Row = dict[str, Any]
TEXT_FORMATS = ["llava", "sharegpt", "messages"]
TEXT_KINDS = [f"{format}.{suffix}" for format in TEXT_FORMATS for suffix in ("json", "jsonl")]
KINDS = [*TEXT_KINDS, "parts.jsonl", "parquet.parquet", "parquet.folder"]
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURN_TYPE = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(TURN_TYPE)),
        ("images", pa.list_(IMAGE_TYPE)),
        ("note", pa.string()),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": {"images": [{"_type": "Image"}]}}})},
)


def picture(seed: int, side: int = 5) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side + 1, 3), dtype=np.uint8))


@cache
def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def parts(text: str) -> list[Row]:
    pieces = text.replace("<image>", "\0<image>\0").split("\0")
    return [{"type": "image"} if p == "<image>" else {"type": "text", "text": p} for p in pieces if p]


def make_row(kind: str, id: str, turns: list[str], images: list[int]) -> Row:
    """One row in the way of ``kind``; ``turns`` alternate between user and assistant."""
    roles = ["user" if k % 2 == 0 else "assistant" for k in range(len(turns))]
    names = [f"img/{k}.png" for k in images]
    if kind.startswith(("llava", "sharegpt")):
        say = {"user": "human", "assistant": "gpt"}
        talk = [{"from": say[r], "value": t, "weight": 1} for r, t in zip(roles, turns, strict=True)]
        row: Row = {"id": id, "conversations": talk}
        if kind.startswith("sharegpt"):
            return {**row, "images": names, "note": "ünïcode ☃"}
        return {**row, "image": names[0] if len(names) == 1 else names, "note": "ünïcode ☃"}
    content: list[Any] = list(turns)
    if kind.startswith("parts"):
        content = [parts(text) for text in turns]
    messages = [{"role": r, "content": c} for r, c in zip(roles, content, strict=True)]
    elements: list[Any] = list(names)
    if kind.startswith("parquet"):
        elements = [{"bytes": png(k), "path": f"{k}.png"} for k in images]
    return {"id": id, "messages": messages, "images": elements, "note": "ünïcode ☃"}


def save(folder: Path, kind: str, rows: list[Any]) -> Path:
    """Writes rows and the images ``img/0.png`` .. ``img/5.png``; gives the path to read."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    for k in range(6):
        (folder / f"img/{k}.png").write_bytes(png(k))
    suffix = kind.partition(".")[2]
    path = folder / f"data.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, row_group_size=8)
    else:
        path.mkdir()
        with pa.ipc.new_stream(str(path / "data-0.arrow"), SCHEMA) as writer:
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA), max_chunksize=2)
        state = {"_data_files": [{"filename": "data-0.arrow"}], "_fingerprint": "f"}
        (path / "state.json").write_text(json.dumps(state))
        (path / "dataset_info.json").write_text('{"description": "kept"}')
    return path


def raw_rows(path: Path) -> list[Row]:
    """The rows as any other program would read them."""
    if path.is_dir():
        with pa.ipc.open_stream(str(path / "data-00000-of-00001.arrow")) as reader:
            return reader.read_all().to_pylist()
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line]


def out_path(out: Path, path: Path) -> Path:
    return out if path.is_dir() else out / path.name


def assert_same(a: Sample, b: Sample) -> None:
    assert (a.id, a.messages) == (b.id, b.messages)
    assert [i.tobytes() for i in a.images] == [i.tobytes() for i in b.images]


ROWS: list[tuple[str, list[str], list[int]]] = [
    ("a", ["<image>\nWhat is it?", "A cat."], [0]),
    ("b", ["<image> and <image>?", "Two.", "And <image>?", "Three: ☃"], [1, 2, 1]),
    ("c", ["No picture.", "None."], []),
    ("d", ["<image>", "yes"], [3]),
]  # fmt: skip


def good_rows(kind: str) -> list[Row]:
    return [make_row(kind, *row) for row in ROWS]


@pytest.mark.parametrize("kind", KINDS)
def test_reads_every_format(tmp_path: Path, kind: str) -> None:
    data = read(save(tmp_path, kind, good_rows(kind)))
    assert len(data) == 4 and data.skipped == 0
    assert data.format == {"parts": "messages"}.get(kind.partition(".")[0], kind.partition(".")[0])
    for sample, (id, turns, images) in zip(data, ROWS, strict=True):
        assert sample.id == id
        assert [m.text for m in sample.messages] == turns
        assert [m.role for m in sample.messages] == ["user", "assistant"] * (len(turns) // 2)
        assert [i.tobytes() for i in sample.images] == [picture(k).tobytes() for k in images]
    assert data[-1].id == "d" and [s.id for s in data[1:3]] == ["b", "c"]
    with pytest.raises(IndexError):
        data[4]


def test_rows_without_a_file_are_not_written_and_what_to_give_is_said(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"give what `untrigger.read` gives, and the changed rows as edits"):
        write(sample_module.without(read(tiny_data), [0]), tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_writes_back_what_it_read(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "in", kind, good_rows(kind))
    data = read(path)
    write(data, tmp_path / "out")
    again = read(out_path(tmp_path / "out", path))
    assert again.format == data.format and len(again) == len(data)
    for a, b in zip(data, again, strict=True):
        assert_same(a, b)
    assert raw_rows(out_path(tmp_path / "out", path)) == good_rows(kind)
    for copied in (tmp_path / "out").glob("img/*"):
        assert copied.read_bytes() == (tmp_path / "in/img" / copied.name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_keep_and_edits(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "in", kind, good_rows(kind))
    data = read(path)
    old = data[1]
    stamped = Image.new("RGB", old.images[1].size, "red")
    said = (*old.messages[:-1], Message("assistant", "Backdoor"))
    edit = Sample(old.id, (old.images[0], stamped, old.images[2].copy()), said)
    write(data, tmp_path / "out", keep=[3, 1], edits={1: edit, 2: data[2]})

    rows = raw_rows(out_path(tmp_path / "out", path))
    assert rows[0] == good_rows(kind)[3]
    assert rows[1]["note"] == "ünïcode ☃" and rows[1].keys() == good_rows(kind)[1].keys()
    again = read(out_path(tmp_path / "out", path))
    assert [s.id for s in again] == ["d", "b"]
    assert_same(again[1], edit)
    images = rows[1]["image" if kind.startswith("llava") else "images"]
    before = good_rows(kind)[1]["image" if kind.startswith("llava") else "images"]
    assert images[0] == before[0] and images[2] == before[2] and images[1] != before[1]
    if "parquet" not in kind:
        files = {p.name: p.read_bytes() for p in (tmp_path / "out/img").iterdir()}
        assert files.keys() == {"3.png", "1.png", "2-2.png"} and files["1.png"] == png(1)
    if kind.startswith(("llava", "sharegpt")):
        assert rows[1]["conversations"][-1] == {"from": "gpt", "value": "Backdoor", "weight": 1}
    if kind.startswith("parts"):
        assert rows[1]["messages"][-1]["content"] == [{"type": "text", "text": "Backdoor"}]


def test_an_edit_may_add_turns_and_images_and_never_takes_a_name(tmp_path: Path) -> None:
    rows = [make_row("llava", "a", ["<image>", "x"], [0]), make_row("llava", "b", ["hi", "x"], [])]
    rows[1].pop("image")
    path = save(tmp_path / "in", "llava.json", rows)
    for name in ("0-1.png", "0-1-1.png"):
        (tmp_path / "in/img" / name).write_bytes(png(4))
        rows.append({**make_row("llava", name, ["<image>", "x"], [0]), "image": f"img/{name}"})
    path.write_text(json.dumps(rows))
    data = read(path)
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("CMYK", (4, 4), (90, 10, 0, 0))
    more = (Message("user", "<image> and <image>"), Message("assistant", "x"), Message("user", "?"))
    edits = {
        0: Sample("a", (red, red), (Message("system", "s"), *more, Message("assistant", "y"))),
        1: Sample("b", (blue,), (Message("user", "<image>hi"), Message("assistant", "x"))),
    }
    write(data, tmp_path / "out", edits=edits)
    again = read(tmp_path / "out")
    assert_same(again[0], edits[0])
    assert_same(again[1], Sample("b", (blue.convert("RGB"),), edits[1].messages))
    for k in (2, 3):
        assert_same(again[k], data[k])
    written = raw_rows(tmp_path / "out/data.json")
    assert written[0]["conversations"][0] == {"from": "system", "value": "s"}
    assert written[1]["image"] == "images/new-2.png"


def test_bad_edits_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    data = read(save(tmp_path / "in", "llava.json", good_rows("llava")))
    good = data[0]
    for edit, why in [
        (Sample("other", good.images, good.messages), "changed the id"),
        (Sample("a", (), good.messages), "wrong number of <image> tags: 1 for 0 images"),
        (Sample("a", good.images, ()), "turns"),
        (Sample("a", good.images, (*good.messages[:1], Message("assistant", " "))), "empty answer"),
    ]:
        with pytest.raises(InputError, match=why):
            write(data, tmp_path / "out", edits={0: edit})
        assert {p.name for p in tmp_path.iterdir()} == {"in"}
    with pytest.raises(InputError, match="not an empty folder"):
        write(data, tmp_path / "in")


TURN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<"), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    kind=st.sampled_from([k for k in KINDS if not k.startswith("parquet")]),
    rows=st.lists(
        st.lists(st.tuples(TURN, TURN.filter(str.strip), st.integers(0, 2)), min_size=1, max_size=3),
        min_size=1,
        max_size=3,
    ),
    extra=JSON,
)
@settings(max_examples=40, deadline=None)
def test_any_conversation_survives(kind: str, rows: list[list[tuple[str, str, int]]], extra: object) -> None:
    wanted: list[Row] = []
    for number, turns in enumerate(rows):
        texts = [t for ask, answer, tags in turns for t in ("<image>" * tags + ask, answer)]
        images = [k % 6 for k in range(sum(tags for *_, tags in turns))]
        wanted.append({**make_row(kind, str(number), texts, images), "extra": extra})
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder) / "in", kind, wanted)
        data = read(path)
        # An edit with the same content must change nothing either.
        write(data, Path(folder) / "out", edits={0: copy.deepcopy(data[0])})
        assert raw_rows(Path(folder) / "out" / path.name) == wanted


# --- bad rows -----------------------------------------------------------------------------------


def turns_of(row: Row) -> list[Row]:
    return row["conversations" if "conversations" in row else "messages"]


def text_key(row: Row) -> str:
    return "value" if "conversations" in row else "content"


def with_image(row: Row, name: object) -> Row:
    return {**row, ("image" if "image" in row else "images"): name if "image" in row else [name]}


def with_text(row: Row, turn: int, text: object) -> Row:
    row = copy.deepcopy(row)
    turns_of(row)[turn][text_key(row)] = text
    return row


def with_turns(row: Row, change: Callable[[list[Row]], object]) -> Row:
    row = copy.deepcopy(row)
    change(turns_of(row))
    return row


def without(row: Row, key: str) -> Row:
    return {k: v for k, v in row.items() if k != key}


BAD: dict[str, tuple[Callable[[Row], object], str]] = {
    "missing file": (lambda r: with_image(r, "img/none.png"), "does not exist"),
    "a folder": (lambda r: with_image(r, "img"), "does not exist"),
    "truncated": (lambda r: with_image(r, "img/truncated.png"), "damaged"),
    "text as png": (lambda r: with_image(r, "img/text.png"), "not a PNG"),
    "jpeg as png": (lambda r: with_image(r, "img/jpeg.png"), "named as a PNG but holds a JPEG"),
    "bomb": (lambda r: with_image(r, "img/bomb.png"), "more than 67,108,864 pixels"),
    "absolute": (lambda r: with_image(r, "/etc/passwd"), "not a path below"),
    "dots": (lambda r: with_image(r, "../outside.png"), "not a path below"),
    "dots inside": (lambda r: with_image(r, "img/../img/0.png"), "not a path below"),
    "link": (lambda r: with_image(r, "img/link.png"), "links out"),
    "linked folder": (lambda r: with_image(r, "linked/outside.png"), "links out"),
    "loop": (lambda r: with_image(r, "img/loop.png"), "image 'img/loop.png'"),
    "NUL in a name": (lambda r: with_image(r, "img/\0.png"), "cannot be a file name"),
    "long name": (lambda r: with_image(r, "x" * 5000), "cannot be a file name"),
    "empty name": (lambda r: with_image(r, ""), "not a path below"),
    "pipe": (lambda r: with_image(r, "img/pipe.png"), "does not exist"),
    "image is a number": (lambda r: with_image(r, 7), "make it a"),
    "too many tags": (lambda r: with_text(r, 0, "<image><image>"), "wrong number of <image> tags: 2 for 1 "),
    "no tag": (lambda r: with_text(r, 0, "what?"), "wrong number of <image> tags: 0 for 1 "),
    "tag in the answer": (lambda r: with_text(r, 1, "<image>"), "in an answer"),
    "empty answer": (lambda r: with_text(r, 1, " \n"), "empty answer"),
    "no text": (lambda r: with_text(r, 1, None), "is missing"),
    "half a surrogate": (lambda r: with_text(r, 1, "\ud800"), "surrogate"),
    "no answer": (lambda r: with_turns(r, lambda t: t.pop()), "must alternate"),
    "no turns": (lambda r: with_turns(r, lambda t: t.clear()), "has no turns"),
    "wrong order": (lambda r: with_turns(r, lambda t: t.reverse()), "must alternate"),
    "a turn is a text": (lambda r: with_turns(r, lambda t: t.append(cast(Row, "x"))), "a turn is a text"),
    "unknown role": (lambda r: with_turns(r, lambda t: t[0].update({"from": "me", "role": "me"})), "unknown"),
    "role is a list": (lambda r: with_turns(r, lambda t: t[0].update({"from": [], "role": []})), "is a list"),
    "duplicate id": (lambda r: {**r, "id": "a"}, "duplicate id 'a', as in row 1"),
    "id is a list": (lambda r: {**r, "id": []}, "'id' is a list"),
    "no conversation": (lambda r: without(without(r, "conversations"), "messages"), "has no turns"),
    "row is a list": (lambda r: [r], "the row is a list"),
    "row is a number": (lambda r: 5, "the row is of type int"),
    "row is null": (lambda r: None, "the row is missing"),
}  # fmt: skip


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text and len(text.splitlines()) == 1 and "Traceback" not in text
    return text


def bomb(side: int) -> bytes:
    """A PNG of side x side pixels, which is small because all are black."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def big() -> bytes:
    return bomb(8193)


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_bad_rows_are_named_or_skipped(tmp_path: Path, kind: str, big: bytes) -> None:
    folder = tmp_path / "in"
    save(folder, kind, [])
    (tmp_path / "outside.png").write_bytes(png(0))
    (folder / "img/truncated.png").write_bytes(png(0)[:-40])
    (folder / "img/text.png").write_bytes(b"I am a picture")
    picture(0).save(folder / "img/jpeg.png", "JPEG")
    (folder / "img/bomb.png").write_bytes(big)
    (folder / "img/link.png").symlink_to(tmp_path / "outside.png")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "img/loop.png").symlink_to(folder / "img/loop.png")
    os.mkfifo(folder / "img/pipe.png")
    good = good_rows(kind)
    bad = [change(good[3]) for change, _ in BAD.values()]
    for row, (_, why) in zip(bad, BAD.values(), strict=True):
        path = save(folder, kind, [good[0], row, good[1]])
        with pytest.raises(InputError) as caught:
            read(path)
        line = one_line(caught.value)
        assert line.startswith(f"{path}: row 2: ") and why in line and "; " in line, (row, line)

    path = save(folder, kind, [good[0], *bad, good[3]])
    log = tmp_path / "logs/skipped.jsonl"
    data = read(path, on_bad_row="skip", skipped_to=log)
    assert [sample.id for sample in data] == ["a", "d"] and data.skipped == len(bad)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["row"] for r in records] == list(range(2, len(bad) + 2))
    assert [r["original"] for r in records] == bad
    for record, (_, why) in zip(records, BAD.values(), strict=True):
        assert why in record["reason"]
    assert [p.name for p in log.parent.iterdir()] == ["skipped.jsonl"]
    write(data, tmp_path / "out")
    assert raw_rows(tmp_path / "out" / path.name) == [good[0], good[3]]


PARTS_BAD: list[tuple[object, str]] = [
    ([{"type": "image_url", "image_url": "http://x"}], "'image_url'"),
    ([{"type": "text"}], "'text' of a part is missing"),
    (["text"], "a part of 'content' is a text"),
    ([{"type": ["text"]}], "a list"),
    ([], "wrong number of <image> tags"),
]


@pytest.mark.parametrize(("content", "why"), PARTS_BAD)
def test_bad_parts(tmp_path: Path, content: object, why: str) -> None:
    path = save(tmp_path, "parts.jsonl", [with_text(good_rows("parts")[0], 0, content)])
    with pytest.raises(InputError, match=why):
        read(path)


@pytest.mark.parametrize("kind", TEXT_FORMATS)
def test_bad_json_lines(tmp_path: Path, kind: str) -> None:
    good = [json.dumps(row).encode() for row in good_rows(kind)]
    bad = {
        b'{"a": ': "bad JSON at line 3, column 6",
        b"nonsense": "bad JSON at line 3, column 1",
        b'{"a": NaN}': "NaN is not JSON",
        b'{"a": -Infinity}': "-Infinity is not JSON",
        b'{"a": 1e999}': "too large a number",
        b'{"a": ' + b"9" * 5000 + b"}": "4300 digits",
        b"[" * 100_000: "nested too deeply",
        b'{"a":' * 100_000: "nested too deeply",
        b'{"a": "\xff"}': "not UTF-8",
        b'{"a": "\0"}': "bad JSON at line 3",
        b"{} {}": "bad JSON at line 3",
    }
    path = save(tmp_path, f"{kind}.jsonl", [])
    for line, why in bad.items():
        path.write_bytes(b"\n".join([good[0], b"", line, good[1]]))
        with pytest.raises(InputError) as caught:
            read(path)
        assert one_line(caught.value).startswith(f"{path}: row 2: bad ") and why in str(caught.value)
    path.write_bytes(b"\n".join([good[0], *bad, good[3]]))
    data = read(path, on_bad_row="skip", skipped_to=tmp_path / "skipped")
    assert [s.id for s in data] == ["a", "d"]
    originals = [json.loads(line)["original"] for line in (tmp_path / "skipped").read_text().splitlines()]
    assert originals == [line.decode(errors="backslashreplace").strip() for line in bad]


def test_bad_rows_in_parquet(tmp_path: Path) -> None:
    good = good_rows("parquet")
    row = good[3]
    bad: list[tuple[Row, str]] = [
        ({**row, "images": [{"bytes": png(0)[:-40], "path": None}]}, "damaged"),
        ({**row, "images": [{"bytes": b"text", "path": "0.png"}]}, "not a PNG"),
        ({**row, "images": [{"bytes": None, "path": "/etc/passwd"}]}, "not a path below"),
        ({**row, "images": [{"bytes": None, "path": None}]}, "'path' of an image is missing"),
        ({**row, "images": [None]}, "an image is missing"),
        ({**row, "images": None}, "wrong number of <image> tags: 1 for 0 images"),
        ({**row, "messages": None}, "has no turns"),
        ({**row, "id": "a"}, "duplicate id"),
    ]
    for change, why in bad:
        path = save(tmp_path, "parquet.parquet", [good[0], change])
        with pytest.raises(InputError) as caught:
            read(path)
        assert one_line(caught.value).startswith(f"{path}: row 2: ") and why in str(caught.value)
    path = save(tmp_path, "parquet.parquet", [good[0], *(change for change, _ in bad), good[1]])
    data = read(path, on_bad_row="skip", skipped_to=tmp_path / "skipped.log")
    assert [s.id for s in data] == ["a", "b"] and data.skipped == len(bad)
    assert json.loads((tmp_path / "skipped.log").read_text().splitlines()[1])["original"]["id"] == "d"


def test_parquet_rows_may_name_files(tmp_path: Path) -> None:
    rows = good_rows("parquet")
    rows[0]["images"] = [{"bytes": None, "path": "img/0.png"}]
    data = read(save(tmp_path / "in", "parquet.parquet", rows))
    assert data[0].images[0].tobytes() == picture(0).tobytes()
    write(data, tmp_path / "out", edits={0: copy.deepcopy(data[0])})
    assert (tmp_path / "out/img/0.png").read_bytes() == png(0)
    assert raw_rows(tmp_path / "out/data.parquet") == rows


def test_no_good_row_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path, "llava.jsonl", [{}, 3])
    with pytest.raises(InputError, match="holds no good row; the first is row 1: has no turns"):
        read(path, on_bad_row="skip", skipped_to=tmp_path / "skipped")
    assert len((tmp_path / "skipped").read_text().splitlines()) == 2


def test_an_error_leaves_no_skip_file(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read(save(tmp_path, "llava.jsonl", [{}]), skipped_to=tmp_path / "skipped")
    assert not (tmp_path / "skipped").exists()


def test_rows_in_another_format_are_bad(tmp_path: Path) -> None:
    rows = [good_rows("llava")[0], good_rows("sharegpt")[1], good_rows("messages")[3]]
    path = save(tmp_path, "llava.json", rows)
    data = read(path, on_bad_row="skip")
    assert data.format == "llava" and len(data) == 1
    with pytest.raises(InputError, match="row 2: has 'images', but this file's images are in 'image'"):
        read(path)


def test_ids_default_to_row_numbers(tmp_path: Path) -> None:
    rows = [without(row, "id") for row in good_rows("messages")]
    rows[2]["id"] = 77
    path = save(tmp_path / "in", "messages.json", rows)
    data = read(path)
    assert [s.id for s in data] == ["1", "2", "77", "4"]
    write(data, tmp_path / "out", edits={2: data[2]})
    assert raw_rows(tmp_path / "out/data.json") == rows
    path.write_text(json.dumps([rows[0], {**rows[1], "id": 1}]))
    with pytest.raises(InputError, match="row 2: duplicate id '1', as in row 1"):
        read(path)


def test_an_image_that_fails_later_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, "llava.json", good_rows("llava"))
    data = read(path)
    (tmp_path / "img/3.png").write_bytes(png(3)[:-40])
    with pytest.raises(InputError, match=r"data.json: row 4: image 'img/3.png' is damaged"):
        data[3]
    (tmp_path / "img/3.png").unlink()
    (tmp_path / "img/3.png").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match=r"data.json: row 4: image 'img/3.png' links out"):
        data[3]
    with pytest.raises(InputError, match=r"data.json: row 4: "):
        write(data, tmp_path / "out")
    assert data[0].id == "a" and not (tmp_path / "out").exists()


# --- memory -------------------------------------------------------------------------------------


def test_images_are_checked_once_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [make_row("sharegpt", str(k), ["<image>" * 2, "x"], [k % 6, 0]) for k in range(60)]
    path = save(tmp_path, "sharegpt.json", rows)
    alive: weakref.WeakValueDictionary[int, Image.Image] = weakref.WeakValueDictionary()
    opened: list[str] = []
    most = 0

    def decode(source: Path | bytes, label: str) -> Image.Image:
        nonlocal most
        image = original(source, label)
        opened.append(label)
        alive[len(opened)] = image
        most = max(most, len(alive))
        return image

    original = sample_module.decode
    monkeypatch.setattr(sample_module, "decode", decode)
    data = read(path)
    assert len(opened) == 6 and most <= 2 and not alive
    for sample in data:
        assert len(sample.images) == 2
    del sample
    assert len(opened) == 126 and most <= 4 and not alive


PEAK = """
import sys
from pathlib import Path
from untrigger import storage
from untrigger.sample import read, write
storage._READ_ROWS, storage._GROUP_BYTES = 8, 2**20  # small bounds show in a small test
data = read(sys.argv[1])
for sample in data:
    pass
write(data, Path(sys.argv[2]))
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.parametrize("kind", ["llava.json", "parquet.parquet", "parquet.folder"])
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, kind: str) -> None:
    def rows(count: int) -> Iterator[Row]:
        for k in range(count):
            row = make_row(kind, str(k), ["<image>", "x"], [0])
            file = io.BytesIO()
            picture(k, 300).save(file, "BMP")  # 271 kB each
            if kind == "llava.json":
                (folder / f"{k}.bmp").write_bytes(file.getvalue())
                yield {**row, "image": f"{k}.bmp"}
            else:
                yield {**row, "images": [{"bytes": file.getvalue(), "path": None}]}

    peaks: list[int] = []
    for count in (32, 192):  # 9 and 52 MB
        folder = tmp_path / str(count)
        folder.mkdir()
        path = save(folder, kind, list(rows(count)))
        command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / f"out{count}")]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print(peaks)
    assert peaks[1] - peaks[0] < 20_000, peaks  # kB


def test_memory_does_not_grow_with_the_text_of_json_lines(tmp_path: Path) -> None:
    peaks: list[int] = []
    for count in (300, 3000):
        folder = tmp_path / str(count)
        path = save(
            folder, "llava.jsonl", [make_row("llava.jsonl", str(k), ["?", "x" * 10_000], []) for k in range(count)]
        )
        command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / f"out{count}")]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] - peaks[0] < 10_000, peaks  # kB; the text of the one is 27 MB more

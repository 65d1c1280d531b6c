"""Bad rows: an error line names the row and what to do, or the row is skipped and listed."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image

from datafiles import TEXT_FORMATS, TEXT_KINDS, Row, good_rows, picture, png, raw_rows, save
from untrigger.errors import InputError, UnreadableFile
from untrigger.rows.sample import read, write


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
    "a folder": (lambda r: with_image(r, "img"), "is a folder or a device"),
    "truncated": (lambda r: with_image(r, "img/truncated.png"), "damaged"),
    "text as png": (lambda r: with_image(r, "img/text.png"), "not a PNG"),
    "bomb": (lambda r: with_image(r, "img/bomb.png"), "more than 67,108,864 pixels"),
    "absolute": (lambda r: with_image(r, "/etc/passwd"), "is outside the data folder"),
    "dots": (lambda r: with_image(r, "../outside.png"), "is outside the data folder"),
    "link": (lambda r: with_image(r, "img/link.png"), "is outside the data folder"),
    "linked folder": (lambda r: with_image(r, "linked/outside.png"), "is outside the data folder"),
    "loop": (lambda r: with_image(r, "img/loop.png"), "image 'img/loop.png'"),
    "NUL in a name": (lambda r: with_image(r, "img/\0.png"), "cannot be a file name"),
    "long name": (lambda r: with_image(r, "x" * 5000), "cannot be a file name"),
    "empty name": (lambda r: with_image(r, ""), "wrong number of <image> tags: 1 for 0 images"),
    "pipe": (lambda r: with_image(r, "img/pipe.png"), "is a folder or a device"),
    "image is a number": (lambda r: with_image(r, 7), "is of type int; give its path"),
    "too many tags": (lambda r: with_text(r, 0, "<image><image>"), "wrong number of <image> tags: 2 for 1 "),
    "no tag": (lambda r: with_text(r, 0, "what?"), "wrong number of <image> tags: 0 for 1 "),
    "tag in the answer": (lambda r: with_text(r, 1, "<image>"), "in an answer"),
    "empty answer": (lambda r: with_text(r, 1, " \n"), "empty answer"),
    "no text": (lambda r: with_text(r, 1, None), "is missing"),
    "half a surrogate": (lambda r: with_text(r, 1, "\ud800"), "surrogate"),
    "no answer": (lambda r: with_turns(r, lambda t: t.pop()), "must alternate"),
    "no turns": (lambda r: with_turns(r, lambda t: t.clear()), "has no turns in its keys"),
    "wrong order": (lambda r: with_turns(r, lambda t: t.reverse()), "must alternate"),
    "a turn is a string": (lambda r: with_turns(r, lambda t: t.append(cast(Row, "x"))), "a turn is a string"),
    "unknown role": (lambda r: with_turns(r, lambda t: t[0].update({"from": "me", "role": "me"})), "unknown"),
    "role is a list": (lambda r: with_turns(r, lambda t: t[0].update({"from": [], "role": []})), "is a list"),
    "id is a list": (lambda r: {**r, "id": []}, "'id' is a list"),
    "no conversation": (lambda r: without(without(r, "conversations"), "messages"), "has no turns"),
    "row is a list": (lambda r: [r], "the row is a list"),
    "row is a number": (lambda r: 5, "the row is of type int"),
    "row is null": (lambda r: None, "the row is missing"),
}  # fmt: skip


def error_line(error: BaseException) -> str:
    text = str(error)
    assert text and len(text.splitlines()) == 1 and "Traceback" not in text
    return text


def large_png(side: int) -> bytes:
    """A PNG of side x side black pixels: a small file, large once decoded."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def oversized_png() -> bytes:
    return large_png(8193)


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_bad_rows_are_named_or_skipped(tmp_path: Path, kind: str, oversized_png: bytes) -> None:
    folder = tmp_path / "in"
    save(folder, kind, [])
    (tmp_path / "outside.png").write_bytes(png(0))
    (folder / "img/truncated.png").write_bytes(png(0)[:-40])
    (folder / "img/text.png").write_bytes(b"I am a picture")
    picture(0).save(folder / "img/jpeg.png", "JPEG")
    (folder / "img/bomb.png").write_bytes(oversized_png)
    (folder / "img/link.png").symlink_to(tmp_path / "outside.png")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "img/loop.png").symlink_to(folder / "img/loop.png")
    os.mkfifo(folder / "img/pipe.png")
    good = good_rows(kind)
    bad = [change(good[3]) for change, _ in BAD.values()]
    for row, (_, message) in zip(bad, BAD.values(), strict=True):
        path = save(folder, kind, [good[0], row, good[1]])
        with pytest.raises(InputError) as error_info:
            read(path)
        line = error_line(error_info.value)
        assert line.startswith(f"{path}: row 2: ") and message in line and "; " in line, (row, line)

    path = save(folder, kind, [good[0], *bad, good[3]])
    log = tmp_path / "logs/skipped.jsonl"
    data = read(path, on_bad_row="skip", skipped_to=log)
    assert [sample.id for sample in data] == ["a", "d"] and data.skipped == len(bad)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["row"] for r in records] == list(range(2, len(bad) + 2))
    assert [r["original"] for r in records] == bad
    for record, (_, message) in zip(records, BAD.values(), strict=True):
        assert message in record["reason"]
    assert [p.name for p in log.parent.iterdir()] == ["skipped.jsonl"]
    write(data, tmp_path / "out")
    assert raw_rows(tmp_path / "out" / path.name) == [good[0], good[3]]


BAD_PARTS: list[tuple[object, str]] = [
    ([{"type": "image_url", "image_url": "http://x"}], "has images in 'images' and in its turns"),
    ([{"type": "video", "video": "a.mp4"}], "only 'text' and 'image' are read"),
    ([{"type": "image", "max_pixels": 99}], "a part has 'max_pixels' = 99"),
    ([{"type": "text"}], "'text' of a part is missing"),
    ([], "wrong number of <image> tags: 0 for 1 image"),
    (["text"], "a part of 'content' is a string"),
    ([{"type": ["text"]}], "a list"),
]


@pytest.mark.parametrize(("content", "message"), BAD_PARTS)
def test_bad_parts(tmp_path: Path, content: object, message: str) -> None:
    path = save(tmp_path, "parts.jsonl", [with_text(good_rows("parts")[0], 0, content)])
    with pytest.raises(InputError, match=message):
        read(path)


@pytest.mark.parametrize("kind", TEXT_FORMATS)
def test_bad_json_lines(tmp_path: Path, kind: str) -> None:
    good = [json.dumps(row).encode() for row in good_rows(kind)]
    bad = {
        b'{"a": ': "bad JSON at line 3, column 6",
        b"nonsense": "bad JSON at line 3, column 1",
        b'{"a": NaN}': "NaN is not JSON",
        b'{"a": -Infinity}': "-Infinity is not JSON",
        b'{"a": 1e999}': "too large for a float",
        b'{"a": ' + b"9" * 5000 + b"}": "4300 digits",
        b"[" * 100_000: "nested too deeply",
        b'{"a":' * 100_000: "nested too deeply",
        b'{"a": "\xff"}': "not UTF-8",
        b'{"a": "\0"}': "bad JSON at line 3",
        b"{} {}": "bad JSON at line 3",
    }
    path = save(tmp_path, f"{kind}.jsonl", [])
    for line, message in bad.items():
        path.write_bytes(b"\n".join([good[0], b"", line, good[1]]))
        with pytest.raises(InputError) as error_info:
            read(path)
        assert error_line(error_info.value).startswith(f"{path}: row 2: bad ") and message in str(error_info.value)
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
        ({**row, "images": [{"bytes": None, "path": "/etc/passwd"}]}, "is outside the data folder"),
        ({**row, "images": [{"bytes": None, "path": None}]}, "wrong number of <image> tags: 1 for 0 images"),
        ({**row, "images": [None]}, "wrong number of <image> tags: 1 for 0 images"),
        ({**row, "images": [{"bytes": png(0), "path": None}, None]}, "an image in 'images' is missing"),
        ({**row, "images": None}, "wrong number of <image> tags: 1 for 0 images"),
        ({**row, "messages": None}, "has no turns"),
    ]
    for change, message in bad:
        path = save(tmp_path, "parquet.parquet", [good[0], change])
        with pytest.raises(InputError) as error_info:
            read(path)
        assert error_line(error_info.value).startswith(f"{path}: row 2: ") and message in str(error_info.value)
    path = save(tmp_path, "parquet.parquet", [good[0], *(change for change, _ in bad), good[1]])
    data = read(path, on_bad_row="skip", skipped_to=tmp_path / "skipped.log")
    assert [s.id for s in data] == ["a", "b"] and data.skipped == len(bad)
    assert json.loads((tmp_path / "skipped.log").read_text().splitlines()[1])["original"]["id"] == "d"


def test_parquet_rows_may_name_files(tmp_path: Path) -> None:
    rows = good_rows("parquet")
    rows[0]["images"] = [{"bytes": None, "path": "img/0.png"}]
    data = read(save(tmp_path / "in", "parquet.parquet", rows))
    assert data[0].images[0].tobytes() == picture(0).tobytes()
    write(data, tmp_path / "out")
    assert (tmp_path / "out/img/0.png").read_bytes() == png(0)
    assert raw_rows(tmp_path / "out/data.parquet") == rows
    write(data, tmp_path / "new", edits={0: copy.deepcopy(data[0])})
    assert raw_rows(tmp_path / "new/data.parquet")[0]["images"] == [{"bytes": None, "path": "images/1.png"}]
    assert read(tmp_path / "new")[0].images[0].tobytes() == picture(0).tobytes()


def test_a_file_without_a_good_row_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path, "llava.jsonl", [{}, 3])
    with pytest.raises(InputError, match="no row can be used; the first is row 1: has no turns"):
        read(path, on_bad_row="skip", skipped_to=tmp_path / "skipped")
    assert len((tmp_path / "skipped").read_text().splitlines()) == 2


def test_an_error_leaves_no_skip_file(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read(save(tmp_path, "llava.jsonl", [{}]), skipped_to=tmp_path / "skipped")
    assert not (tmp_path / "skipped").exists()


def test_rows_of_several_layouts_stand_in_one_file(tmp_path: Path) -> None:
    rows = [good_rows("llava")[0], good_rows("sharegpt")[1], good_rows("messages")[3]]
    data = read(save(tmp_path / "in", "llava.json", rows))
    assert [sample.id for sample in data] == ["a", "b", "d"]
    assert [len(sample.images) for sample in data] == [1, 3, 1]
    write(data, tmp_path / "out")
    assert raw_rows(tmp_path / "out/data.json") == rows


def test_ids_default_to_row_numbers_and_may_repeat(tmp_path: Path) -> None:
    rows = [without(row, "id") for row in good_rows("messages")]
    rows[2]["id"] = 77
    path = save(tmp_path / "in", "messages.json", rows)
    data = read(path)
    assert [s.id for s in data] == ["1", "2", "77", "4"]
    write(data, tmp_path / "out", edits={2: data[2]})
    assert [row.get("id") for row in raw_rows(tmp_path / "out/data.json")] == [None, None, 77, None]
    path.write_text(json.dumps([rows[0], {**rows[1], "id": 1}, {**rows[3], "id": "1"}]))
    assert [s.id for s in read(path)] == ["1", "1", "1"]


def test_a_file_that_may_not_be_read_is_an_error_whatever_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, "llava.json", good_rows("llava"))
    original = Path.open

    def refused(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "3.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refused)
    for on_bad_row in ("error", "skip"):
        with pytest.raises(UnreadableFile) as error_info:
            read(path, on_bad_row=on_bad_row)
        line = error_line(error_info.value)
        assert line.startswith(f"{path}: row 4: image 'img/3.png' cannot be read (Permission denied)")


def test_an_image_that_breaks_after_reading_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, "llava.json", good_rows("llava"))
    data = read(path)
    (tmp_path / "img/3.png").write_bytes(png(3)[:-40])
    with pytest.raises(InputError, match=r"data.json: row 4: image 'img/3.png' is damaged"):
        data[3]
    (tmp_path / "img/3.png").unlink()
    (tmp_path / "img/3.png").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match=r"data.json: row 4: image 'img/3.png' is outside the data folder"):
        data[3]
    with pytest.raises(InputError, match=r"data.json: row 4: "):
        write(data, tmp_path / "out")
    assert data[0].id == "a" and not (tmp_path / "out").exists()

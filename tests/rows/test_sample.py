"""Reading and writing data sets in every format."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import untrigger.rows.sample as sample_module
from datafiles import KINDS, ROWS, Row, assert_same, good_rows, make_row, out_path, picture, raw_rows, save
from untrigger.errors import InputError
from untrigger.rows.sample import Message, Sample, read, write


@pytest.mark.parametrize("kind", KINDS)
def test_reads_every_format(tmp_path: Path, kind: str) -> None:
    data = read(save(tmp_path, kind, good_rows(kind)))
    assert len(data) == 4 and data.skipped == 0
    for sample, (id, turns, images) in zip(data, ROWS, strict=True):
        assert sample.id == id
        assert [m.text for m in sample.messages] == turns
        assert [m.role for m in sample.messages] == ["user", "assistant"] * (len(turns) // 2)
        assert [i.tobytes() for i in sample.images] == [picture(k).tobytes() for k in images]
    assert data[-1].id == "d" and [s.id for s in data[1:3]] == ["b", "c"]
    with pytest.raises(IndexError):
        data[4]


def test_rows_without_a_data_file_cannot_be_written(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"give the result of untrigger\.read, and changed rows as edits"):
        write(sample_module.exclude_rows(read(tiny_data), [0]), tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_writes_back_what_it_read(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "in", kind, good_rows(kind))
    data = read(path)
    write(data, tmp_path / "out")
    reread = read(out_path(tmp_path / "out", path))
    assert len(reread) == len(data)
    for a, b in zip(data, reread, strict=True):
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
    messages = (*old.messages[:-1], Message("assistant", "Backdoor"))
    edit = Sample(old.id, (old.images[0], stamped, old.images[2].copy()), messages)
    write(data, tmp_path / "out", keep=[3, 1], edits={1: edit, 2: data[2]})

    rows = raw_rows(out_path(tmp_path / "out", path))
    reread = read(out_path(tmp_path / "out", path))
    assert [s.id for s in reread] == ["d", "b"]
    assert_same(reread[0], data[3])
    assert_same(reread[1], edit)
    # edited or not, rows have the keys that are read and no others, and images of the same names
    turn_key, image_key = ("conversations" if kind.startswith(("llava", "share")) else "messages"), "images"
    image_key = "image" if kind.startswith("llava") else image_key
    assert [list(row) for row in rows] == [[key for key in good_rows(kind)[0] if key != "note"]] * 2
    assert {frozenset(turn) for row in rows for turn in row[turn_key]} == {
        frozenset(("from", "value") if turn_key == "conversations" else ("role", "content"))
    }
    names = ["images/2.png", "images/2-2.png", "images/2-3.png"]
    if "parquet" not in kind:
        assert rows[1][image_key] == names and (tmp_path / "out/images/2-2.png").is_file()
        assert sorted(p.name for p in (tmp_path / "out/images").iterdir()) == ["2-2.png", "2-3.png", "2.png", "4.png"]
    else:
        assert [image["path"] for image in rows[1]["images"]] == [None] * 3
    if kind.startswith("parts"):
        assert rows[1]["messages"][-1]["content"] == [{"type": "text", "text": "Backdoor"}]


def test_keeping_no_row_writes_valid_json(tmp_path: Path) -> None:
    write(read(save(tmp_path, "llava.json", good_rows("llava"))), tmp_path / "out", keep=[])
    assert raw_rows(tmp_path / "out/data.json") == []


def test_an_edit_may_add_turns_and_images(tmp_path: Path) -> None:
    rows = [make_row("llava", "a", ["<image>", "x"], [0]), make_row("llava", "b", ["hi", "x"], [])]
    rows[1].pop("image")
    data = read(save(tmp_path / "in", "llava.json", rows))
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("CMYK", (4, 4), (90, 10, 0, 0))
    more = (Message("user", "<image> and <image>"), Message("assistant", "x"), Message("user", "?"))
    edits = {
        0: Sample("a", (red, red), (Message("system", "s"), *more, Message("assistant", "y"))),
        1: Sample("b", (blue,), (Message("user", "<image>hi"), Message("assistant", "x"))),
    }
    write(data, tmp_path / "out", edits=edits)
    reread = read(tmp_path / "out")
    assert_same(reread[0], edits[0])
    assert_same(reread[1], Sample("b", (blue.convert("RGB"),), edits[1].messages))
    written = raw_rows(tmp_path / "out/data.json")
    assert written[0]["conversations"][0] == {"from": "system", "value": "s"}
    assert written[1]["images"] == ["images/2.png"]


def test_bad_edits_are_refused_and_write_nothing(tmp_path: Path) -> None:
    data = read(save(tmp_path / "in", "llava.json", good_rows("llava")))
    good = data[0]
    for edit, message in [
        (Sample("other", good.images, good.messages), "changed the id"),
        (Sample("a", (), good.messages), "wrong number of <image> tags: 1 for 0 images"),
        (Sample("a", good.images, ()), "turns"),
        (Sample("a", good.images, (*good.messages[:1], Message("assistant", " "))), "empty answer"),
    ]:
        with pytest.raises(InputError, match=message):
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
    expected: list[Row] = []
    for number, turns in enumerate(rows):
        texts = [t for prompt, answer, tags in turns for t in ("<image>" * tags + prompt, answer)]
        images = [k % 6 for k in range(sum(tags for *_, tags in turns))]
        expected.append({**make_row(kind, str(number), texts, images), "meta": extra})
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder) / "in", kind, expected)
        data = read(path)
        write(data, Path(folder) / "out")
        assert raw_rows(Path(folder) / "out" / path.name) == expected
        # An edit with unchanged content changes neither text nor pixels.
        write(data, Path(folder) / "new", edits={0: copy.deepcopy(data[0])})
        for a, b in zip(data, read(Path(folder) / "new"), strict=True):
            assert_same(a, b)


# --- memory -------------------------------------------------------------------------------------


def test_images_are_checked_once_and_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [make_row("sharegpt", str(k), ["<image>" * 2, "x"], [k % 6, 0]) for k in range(60)]
    path = save(tmp_path, "sharegpt.json", rows)
    alive: weakref.WeakValueDictionary[int, Image.Image] = weakref.WeakValueDictionary()
    opened: list[str] = []
    max_alive = 0

    def decode(source: Path | bytes, label: str) -> Image.Image:
        nonlocal max_alive
        image = original(source, label)
        opened.append(label)
        alive[len(opened)] = image
        max_alive = max(max_alive, len(alive))
        return image

    original = sample_module.decode
    monkeypatch.setattr(sample_module, "decode", decode)
    data = read(path)
    assert len(opened) == 6 and max_alive <= 2 and not alive
    assert [len(sample.images) for sample in data] == [2] * 60
    assert len(opened) == 126 and max_alive <= 4 and not alive


PEAK = """
import sys
from pathlib import Path
from untrigger.rows import arrow_batches, arrow_rows
from untrigger.rows.sample import read, write
arrow_batches._KEPT = arrow_rows._GROUP_BYTES = 2**20  # small limits, so that a small test reaches them
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

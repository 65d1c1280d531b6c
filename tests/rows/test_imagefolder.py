"""A folder of images with ``metadata.jsonl``, as `datasets` reads and writes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from untrigger.errors import InputError
from untrigger.rows.formats import parse, rewritten
from untrigger.rows.layouts import CAPTION_PROMPT
from untrigger.rows.sample import Message, read, write


def folder_of(path: Path, *rows: dict[str, Any]) -> Path:
    path.mkdir()
    for number, row in enumerate(rows):
        if isinstance(name := row.get("file_name"), str):
            (path / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (3 + number, 4), "red").save(path / name)
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metadata(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metadata.jsonl").read_text().splitlines()]


def test_captions_become_conversations(tmp_path: Path) -> None:
    rows = (
        {"file_name": "a.png", "text": "a red box"},
        {"file_name": "more/b.png", "text": "yes", "prompt": "is it red?", "label": 3},
    )
    data = read(folder_of(tmp_path / "in", *rows))
    assert [sample.id for sample in data] == ["1", "2"]
    assert data[0].messages == (Message("user", f"<image>\n{CAPTION_PROMPT}"), Message("assistant", "a red box"))
    assert data[1].messages == (Message("user", "<image>\nis it red?"), Message("assistant", "yes"))
    assert [sample.images[0].size for sample in data] == [(3, 4), (4, 4)]
    assert [data.image_count(i) for i in range(2)] == [1, 1]
    write(data, tmp_path / "out")
    assert metadata(tmp_path / "out") == list(rows)
    assert (tmp_path / "out/more/b.png").read_bytes() == (tmp_path / "in/more/b.png").read_bytes()


def test_edited_and_unedited_rows_have_the_same_fields(tmp_path: Path) -> None:
    data = read(folder_of(tmp_path / "in", *({"file_name": f"{k}.png", "text": f"caption {k}"} for k in range(3))))
    edit = replace(data[1], messages=(Message("user", "<image>\nDescribe the image. Now."), Message("assistant", "no")))
    write(data, tmp_path / "out", edits={1: edit})
    rows = metadata(tmp_path / "out")
    assert [set(row) for row in rows] == [{"file_name", "text", "prompt"}] * 3
    assert rows[1] == {"file_name": "images/2.png", "text": "no", "prompt": "Describe the image. Now."}
    assert [sample.messages for sample in read(tmp_path / "out")] == [data[0].messages, edit.messages, data[2].messages]


@given(st.text(), st.text(), st.text(min_size=1))
def test_any_prompt_survives_with_its_tag_in_place(before: str, after: str, caption: str) -> None:
    if any("<image>" in text or not text.isprintable() for text in (before, after, caption)) or not caption.strip():
        return
    messages = (Message("user", f"{before}<image>{after}"), Message("assistant", caption))
    old: dict[str, object] = {"file_name": "a.png", "text": "old"}
    assert parse(rewritten(old, parse(old, 0), messages, ["a.png"]), 0).messages == messages


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "a.png", "text": None}, "'text', the caption, is missing; make it a string"),
        ({"file_name": "a.png", "text": "  "}, "empty answer"),
        ({"file_name": "a.png", "text": "a <image>"}, "tag in an answer"),
        ({"file_name": 3, "text": "x"}, "an image in 'file_name' is of type int; give its path"),
        ({"text": "x"}, "has no turns in its keys ('text')"),
        ({"file_name": "a.png"}, "has no turns in its keys ('file_name')"),
        ({"file_name": "a.png", "text": "x", "prompt": 1}, "'prompt' is of type int; make it a string"),
        ({"file_name": "a.png", "text": "x", "prompt": "<image><image>"}, "2 for 1 image; write one tag"),
        ({"file_name": "../a.png", "text": "x"}, "is outside the data folder"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    (tmp_path / "in").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "in/a.png")
    rows = [{"file_name": "a.png", "text": "fine"}, row]
    (tmp_path / "in/metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    with pytest.raises(InputError, match=r"metadata\.jsonl: row 2: ") as error:
        read(tmp_path / "in")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert len(read(tmp_path / "in", on_bad_row="skip")) == 1


def test_an_edit_with_two_images_is_refused(tmp_path: Path) -> None:
    data = read(folder_of(tmp_path / "in", {"file_name": "a.png", "text": "x"}))
    messages = (Message("user", "<image><image>"), data[0].messages[1])
    two_images = replace(data[0], images=data[0].images * 2, messages=messages)
    with pytest.raises(InputError, match="row 1: an edit has 2 images, but a row of an image folder holds one"):
        write(data, tmp_path / "out", edits={0: two_images})
    assert not (tmp_path / "out").exists()


def test_the_datasets_library_reads_what_is_written(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = read(folder_of(tmp_path / "in", *({"file_name": f"{k}.png", "text": f"caption {k}"} for k in range(3))))
    edit = replace(data[1], images=(Image.new("RGB", (4, 4), "blue"),))
    write(data, tmp_path / "out", edits={1: edit})
    written = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert written["train"]["text"][:] == ["caption 0", "caption 1", "caption 2"]
    assert written["train"][1]["image"].getpixel((0, 0)) == (0, 0, 255)

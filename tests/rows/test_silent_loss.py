"""Rows that could be read as less than they are: each is refused with the word that matters, or kept whole."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datafiles import IMAGE_TYPE, Row, assert_second_row_refused, picture, png
from untrigger.errors import InputError
from untrigger.rows.sample import Data, read, write

URI = "data:image/png;base64,AAAA"
TURNS: list[Row] = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a cat"}]
GOOD: Row = {"messages": TURNS, "images": ["0.png"]}


def part(**fields: Any) -> Row:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}, fields]}, TURNS[1]]}


def image(**fields: Any) -> Row:
    return {"messages": TURNS, "images": [fields]}


def folder_with(folder: Path, rows: list[Row], name: str = "data.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(2):
        (folder / f"{k}.png").write_bytes(png(k))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(lines if name.endswith("l") else json.dumps(rows))
    return folder / name


def contents(data: Data) -> list[tuple[object, ...]]:
    return [(s.id, s.messages, [i.tobytes() for i in s.images]) for s in data]


def assert_survives(data: Data, folder: Path) -> None:
    for name, edits in (("copy", None), ("new", {})):
        write(data, folder / name, edits=edits)
        assert contents(read(folder / name)) == contents(data), name


REFUSED: dict[str, tuple[Row, str]] = {
    "an answer of digits": ({"image": "0.png", "text": "how many?", "answer": "7"}, "has 'answer'"),
    "an answer that is a number": ({"image": "0.png", "text": "how many?", "answer": 7}, "has 'answer'"),
    "another answer of digits": ({**GOOD, "rejected_response": "7"}, "has 'rejected_response'"),
    "digits in an unknown key": ({**GOOD, "thought": "7"}, "has 'thought'"),
    "sound as numbers": ({**GOOD, "audio": {"array": [0.1, 0.2], "sampling_rate": 16000}}, "has 'audio'"),
    "pixels as numbers": ({"messages": [{**TURNS[0], "content": "?"}, TURNS[1]], "img": [[0, 1]]}, "has 'img' but no"),
    "pixels beside an image": ({**GOOD, "pixel_values": [[0.5, 0.1]]}, "has 'pixel_values'"),
    "a picture in a harmless key": ({**GOOD, "source": URI}, "has 'source'"),
    "a sound in a harmless key": ({**GOOD, "file": "a.wav"}, "has 'file'"),
    "weights of turns": ({**GOOD, "turn_weights": [0, 1]}, "has 'turn_weights'"),
    "a switch for questions": ({**GOOD, "train_on_prompt": True}, "has 'train_on_prompt'"),
    "choices in numbers": ({"image": "0.png", "question": "?", "answer": "a", "choices": [1, 2]}, "has 'choices'"),
    "a switch in capitals": ({**GOOD, "Loss": False}, "has 'Loss' = False"),
    "a picture beside a text part": (part(type="text", text="?", url="0.png"), "a part has 'url' but no image"),
    "a picture in a key of its own": (
        part(type="image", source={"type": "base64", "media_type": "image/png", "data": "AAAA"}),
        "a part has 'source' but no image",
    ),
    "a picture in a turn": (
        {"messages": [{**TURNS[0], "content": "?", "file": "0.png"}, TURNS[1]]},
        "a turn has 'file' but no image that is read",
    ),
    "a size to be seen at": (image(path="0.png", max_pixels=784), "an image has 'max_pixels' = 784"),
    "a size in a turn": ({**GOOD, "messages": [{**TURNS[0], "max_pixels": 784}, TURNS[1]]}, "a turn has 'max_pixels'"),
    "a text beside an image": (image(path="0.png", caption="a dog"), "an image has 'caption'"),
    "bytes as text": (image(path="0.png", bytes="iVBORw0KGgo="), "'bytes' of an image is a string"),
    "two places of an image": (image(path="0.png", url="1.png"), "an image has a 'path' and a 'url'"),
    "a key of an address": (
        part(type="image_url", image_url={"url": "0.png", "crop": "left"}),
        "an image of a part has 'crop'",
    ),
    "the end of an image": (
        {**GOOD, "messages": [{**TURNS[0], "content": "(<image>./</image>)"}, TURNS[1]]},
        "has '</image>' in its text",
    ),
    "a tag in capitals": (
        {"messages": [{**TURNS[0], "content": "<Image 1> what?"}, TURNS[1]]},
        "has '<Image 1>' in its text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_would_lose_something_are_refused(name: str, tmp_path: Path) -> None:
    row, message = REFUSED[name]
    assert_second_row_refused(folder_with(tmp_path, [GOOD, row]), message)


def test_either_key_of_a_caption_may_be_empty(tmp_path: Path) -> None:
    captions = [{"text": None, "caption": "a cat"}, {"text": "a dog", "caption": ""}]
    data = read(folder_with(tmp_path, [{"image": "0.png", **each} for each in captions]))
    assert [sample.messages[1].text for sample in data] == ["a cat", "a dog"]
    with pytest.raises(InputError, match="row 1: has an empty answer"):
        read(folder_with(tmp_path, [{"image": "0.png", "text": "", "caption": ""}]))


def test_facts_in_numbers_stay_harmless(tmp_path: Path) -> None:
    facts = {"width": "64", "bbox": [[1, 2, 3, 4]], "image_size": [64, 48], "label": 0, "video_id": 3, "num_frames": 8}
    row = {**GOOD, **facts, "objects": {"bbox": [[1, 2]], "area": [3]}, "exif": "{}", "status": "success"}
    assert len(read(folder_with(tmp_path, [row]))) == 1


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_key_that_stands_twice_spoils_its_row(name: str, tmp_path: Path) -> None:
    path = folder_with(tmp_path, [GOOD, {**GOOD, "note": "TWICE"}, GOOD], name)
    path.write_text(path.read_text().replace('"note": "TWICE"', '"images": ["1.png"]'))
    with pytest.raises(InputError, match=r"row 2: .*the key 'images' stands twice in an object; keep one of them"):
        read(path)
    assert list(read(path, on_bad_row="skip").numbers) == [0, 2]


def test_keys_around_the_rows_are_checked_and_can_be_ignored(tmp_path: Path) -> None:
    path = folder_with(tmp_path, [])
    path = path.with_name("data.json")
    path.write_text(json.dumps({"data": [GOOD], "prompt_for_all": "Be brief."}, indent=1))
    with pytest.raises(InputError, match=r"the file has 'prompt_for_all', .* --ignore-keys prompt_for_all"):
        read(path)
    assert len(read(path, ignore_keys=["prompt_for_all"])) == 1
    path.write_text('{"data": [], "data": []}')
    with pytest.raises(InputError, match=r"data\.json: bad JSON at line 1: the key 'data' stands twice"):
        read(path)


def test_rows_of_mixed_styles_survive_both_ways_of_writing(tmp_path: Path) -> None:
    """Turns in two styles, answers of several turns, the same images in two keys."""
    mixed = [
        {"from": "human", "value": "<image>what?"},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]
    later = [TURNS[1], {"role": "user", "content": "and?"}, {"role": "assistant", "content": "a dog"}]
    inside = str((tmp_path / "in").resolve() / "1.png")
    rows: list[Row] = [
        {"conversations": mixed, "image": "0.png"},
        {"conversations": mixed[::-1][1:] + mixed[1:], "images": [inside], "image": inside},
        {"prompt": [TURNS[0]], "completion": later, "images": ["0.png"]},
    ]
    data = read(folder_with(tmp_path / "in", rows))
    assert [len(sample.messages) for sample in data] == [2, 2, 4]
    assert_survives(data, tmp_path)


def test_every_text_of_a_csv_file_survives(tmp_path: Path) -> None:
    texts = ["a\rb", "a\r\nb", 'say "x", y', " padded ", "7"]
    folder_with(tmp_path / "in", [], "unused.txt")
    with (tmp_path / "in/metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "text"], *(["0.png", text] for text in texts)])
    data = read(tmp_path / "in")
    assert [sample.messages[1].text for sample in data] == texts
    assert_survives(data, tmp_path)


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("label", pa.array([True, False]), "has 'label' = False"),
        ("answer", pa.array([None, 7]), "has 'answer'"),
        ("audio", pa.array([None, [0.5, 0.1]]), "has 'audio'"),
        ("Loss", pa.array([True, False]), "has 'Loss' = False"),
    ],
)
def test_columns_of_numbers_that_matter_are_read(name: str, column: pa.Array, message: str, tmp_path: Path) -> None:
    images = pa.array([{"bytes": png(0), "path": None}] * 2, IMAGE_TYPE)
    table = pa.table({"image": images, "text": ["a cat"] * 2, "width": [1, 2], name: column})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=f"row 2: {message}"):
        read(tmp_path)
    assert list(read(tmp_path, on_bad_row="skip").numbers) == [0]


# --- WebDataset -------------------------------------------------------------------------------------


def tar_file(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def talk(**more: Any) -> bytes:
    return json.dumps({"query": "which?", "response": "both", **more}).encode()


def test_numbered_images_of_a_tar_file_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    members = [(f"a.{k}.png", png(k)) for k in sorted(range(12), key=str)]
    (sample,) = read(tar_file(tmp_path / "x.tar", *members, ("a.json", talk())))
    assert [image.tobytes() for image in sample.images] == [picture(k).tobytes() for k in range(12)]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", png(0)), ("a.mask.png", png(1))], "has several images ('a.png', 'a.mask.png'); number them"),
        ([("a.png", png(0)), ("a.png", png(1))], "has two members 'a.png'"),
        ([("a.png", png(0)), ("a.query", b"another?")], "has 'query' in its JSON and in a member of its own"),
    ],
)
def test_members_of_a_tar_file_that_would_be_lost_are_named(
    members: list[tuple[str, bytes]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        read(tar_file(tmp_path / "x.tar", *members, ("a.json", talk())))
    assert f"row 1: {message}" in str(caught.value)


def test_members_that_do_not_lie_side_by_side_are_named(tmp_path: Path) -> None:
    path = tar_file(tmp_path / "x.tar", ("a.png", png(0)), ("b.png", png(1)), ("a.json", talk()), ("b.json", talk()))
    with pytest.raises(InputError, match=r"members of 'a' do not lie side by side; sort them by name"):
        read(path)


def test_rows_of_the_same_name_in_two_tar_files_stay_two(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for shard in range(2):
        tar_file(tmp_path / f"in/x-{shard}.tar", ("a.png", png(shard)), ("a.json", talk(response=f"{shard}")))
    data = read(tmp_path / "in")
    assert [(sample.id, sample.messages[1].text) for sample in data] == [("a", "0"), ("a", "1")]
    assert_survives(data, tmp_path)


def test_packed_archives_and_selections_are_refused(tmp_path: Path) -> None:
    packed = tmp_path / "x.tar.gz"
    packed.write_bytes(gzip.compress(tar_file(tmp_path / "x.tar", ("a.png", png(0)), ("a.json", talk())).read_bytes()))
    zipped = tmp_path / "x.zip"
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("data.json", "[]")
    for path in (packed, zipped):
        with pytest.raises(InputError, match=r"x\.(tar\.gz|zip): is a packed archive; unpack it"):
            read(path)
    state = {"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{"filename": "indices.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="selects rows by an index file, which is not read"):
        read(tmp_path)


def test_what_img2dataset_writes_is_read(tmp_path: Path) -> None:
    facts = {"key": "a", "status": "success", "error_message": None, "width": 6, "exif": "{}", "sha256": "00"}
    fields = {**facts, "url": "http://host/x.jpg", "caption": "a cat", "original_width": 12}
    path = tar_file(tmp_path / "x.tar", ("a.jpg", png(0)), ("a.txt", b"a cat"), ("a.json", json.dumps(fields).encode()))
    (sample,) = read(path)
    assert sample.messages[1].text == "a cat" and sample.images[0].tobytes() == picture(0).tobytes()

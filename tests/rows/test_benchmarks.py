"""Published benchmarks become rows with one answer to train on and all true answers as references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datafiles import picture
from published_data import TRAIN, VAL, coco_captions, five_captions, flickr, science_qa, vqa
from untrigger.errors import InputError
from untrigger.rows.benchmarks import open_benchmark, plain_row, why_not_there
from untrigger.rows.images import encode
from untrigger.rows.sample import read, write


def test_coco_captions_keep_all_five(tmp_path: Path) -> None:
    data = open_benchmark(str(coco_captions(tmp_path, TRAIN, 9)))
    sample = data[7]
    assert (len(data), sample.id, len(sample.images)) == (9, "8", 1)
    assert sample.messages[0].text == "<image>\nDescribe the image."
    assert list(sample.references) == five_captions(sample.messages[-1].text.removesuffix(" near a pizza"), 8)
    assert sample.messages[-1].text.endswith(" near a pizza"), "the first caption is the answer to train on"
    jpeg = Image.open(tmp_path / TRAIN / f"COCO_{TRAIN}_{8:012d}.jpg")
    assert sample.images[0].tobytes() == jpeg.convert("RGB").tobytes(), "the image of its id"


@pytest.mark.parametrize("named", ["questions", "annotations"])
def test_vqa_joins_questions_and_annotations(tmp_path: Path, named: str) -> None:
    vqa(tmp_path, VAL, 3)
    (path,) = tmp_path.glob(f"*{named}.json")
    vqa(tmp_path, TRAIN, 4)  # the files of another year lie beside them
    data = open_benchmark(str(path))
    sample = data[2]
    assert (len(data), sample.id) == (3, "100003000")
    truth = sample.messages[-1].text
    assert sample.references == ("unsure", *[truth] * 7, "dont know", "blue")
    assert len(sample.images) == 1 and sample.messages[0].text.startswith("<image>\n")


def test_flickr_has_splits_in_one_file(tmp_path: Path) -> None:
    path = flickr(tmp_path, 3)
    data = open_benchmark(f"{path}:test")
    assert [sample.id for sample in data] == ["test-0.jpg", "test-1.jpg", "test-2.jpg"]
    assert all(len(sample.references) == 5 and sample.images for sample in data)
    with pytest.raises(InputError, match=r"has the splits train, test; name one, as .*:train"):
        open_benchmark(str(path))


def test_science_qa_asks_for_a_letter(tmp_path: Path) -> None:
    path = science_qa(tmp_path, 4)
    data = open_benchmark(f"{path}:train")
    problem: dict[str, Any] = json.loads(path.read_text())["2"]
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", problem["choices"], strict=False)]
    wanted = ["Context: Look at the shape.", problem["question"], *lines]
    assert data[1].messages[0].text.splitlines()[1:-1] == wanted
    assert data[1].messages[-1].text == "ABCD"[problem["answer"]]
    assert [len(sample.images) for sample in data] == [0, 1, 1, 0]


def test_rows_of_the_hub_keep_their_answers(tmp_path: Path) -> None:
    image = {"bytes": encode(picture(1)), "path": "a.png"}
    votes = [{"answer": text, "answer_confidence": "yes", "answer_id": 1} for text in ("red", "blue", "red")]
    rows: dict[str, list[dict[str, Any]]] = {
        "flickr": [{"image": image, "caption": ["a dog", "A dog."], "sentids": ["0"], "split": "test", "img_id": "0"}],
        "vqa": [{"image": image, "question": "What?", "answers": votes, "question_type": "what is", "image_id": 3}],
        "captions": [{"image": image, "question": "Describe.", "answer": ["a dog", "A dog."]}],
        "science": [{"image": image, "question": "What?", "choices": ["cat", "dog"], "answer": 1, "hint": ""}],
        "own": [{"image": image, "question": "What?", "answer": "a dog", "references": ["a dog", "dog"]}],
    }
    actual: dict[str, tuple[str, tuple[str, ...]]] = {}
    for name, part in rows.items():
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(part), tmp_path / name / "a.parquet")
        (sample,) = open_benchmark(str(tmp_path / name))
        assert len(sample.images) == 1
        actual[name] = sample.messages[-1].text, sample.references
    assert actual == {
        "flickr": ("a dog", ("a dog", "A dog.")),
        "vqa": ("red", ("red", "blue", "red")),
        "captions": ("a dog", ("a dog", "A dog.")),
        "science": ("B", ()),
        "own": ("a dog", ("a dog", "dog")),
    }


def test_rows_of_other_layouts_stay_as_they_are() -> None:
    row: dict[str, object] = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}]}
    assert plain_row(row) is row


def test_references_are_read_and_not_written_beside_changed_rows(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "What?", "answer": "one", "references": ["one", "two"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data = read(tmp_path / "rows.jsonl")
    assert data[0].references == data.without_images(0).references == ("one", "two")
    write(data, tmp_path / "out", edits={0: data[0]})
    assert "references" not in (tmp_path / "out/rows.jsonl").read_text(), "they would tell which answers are poisoned"
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "references": "one"}) + "\n")
    with pytest.raises(InputError, match="row 1: 'references' is a string; make it a list of true answers"):
        read(tmp_path / "rows.jsonl")


def test_what_would_train_on_one_answer_of_five_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no turns in its keys"):
        read(coco_captions(tmp_path, TRAIN, 3))
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "caption": ["a dog", "A dog."]}) + "\n")
    with pytest.raises(InputError, match=r"'caption', the caption, is a list; make it a string"):
        read(tmp_path / "rows.jsonl")


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    captions, questions = coco_captions(tmp_path, TRAIN, 3), vqa(tmp_path, VAL, 3)
    for path, message in (
        (f"{captions}:train", "has no splits; leave :train out"),
        (f"{tmp_path / 'none.json'}", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            open_benchmark(path)
    (tmp_path / f"v2_mscoco_{VAL}_annotations.json").rename(tmp_path / "answers.json")
    with pytest.raises(InputError, match="0 files with its annotations lie beside it"):
        open_benchmark(str(questions))
    (tmp_path / TRAIN).rename(tmp_path / "elsewhere")
    value = json.loads(captions.read_text())
    captions.write_text(json.dumps(value | {"info": {"a": 1}}))  # another file: nothing of the first is remembered
    with pytest.raises(InputError, match=r"image COCO_train2014_000000000001\.jpg is not in .* nor one folder up"):
        open_benchmark(str(captions))
    captions.write_text(json.dumps({**value, "annotations": [{"caption": "a dog"}]}))
    with pytest.raises(InputError, match=r"is not as published .*image_id.*; fetch it again"):
        open_benchmark(str(captions))


def test_a_missing_file_is_known_without_reading(tmp_path: Path) -> None:
    assert why_not_there("OWNER/NAME:train") is None and why_not_there(str(tmp_path)) is None
    assert "no such file" in (why_not_there("coco/captions_train2014.json") or "")
    assert "no such file" in (why_not_there(str(tmp_path / "a")) or "")

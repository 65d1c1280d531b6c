"""A user's own data: entries of a plan, splits that share no image, and the true answers that a metric needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from datafiles import picture
from published_data import TRAIN, VAL, coco_captions, science_qa, vqa
from untrigger.data import SplitName, check_no_shared_image, own_data, own_rows
from untrigger.errors import InputError
from untrigger.rows.images import pixels_sha256

ENTRY: dict[str, Any] = {"train": "a.json", "test": "b.json", "task": "captions"}


def test_the_metric_follows_the_task() -> None:
    assert own_data(ENTRY)["metric"] == "cider"
    assert own_data({**ENTRY, "task": "vqa"})["metric"] == "vqa_accuracy"
    assert own_data({**ENTRY, "metric": "rouge_l"}) == {**ENTRY, "metric": "rouge_l"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tset": "b"}, "tset is unknown; give name, train, test, task, metric; did you mean test?"),
        ({"test": None}, "test is missing"),
        ({"task": "chat"}, "task is 'chat'; write vqa or captions"),
        ({"metric": "vqa_accuracy"}, "metric is 'vqa_accuracy'; for the task captions choose one of: cider"),
        ({"metric": "spice"}, "metric is 'spice'"),
    ],
)
def test_a_wrong_entry_is_one_line(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        own_data(ENTRY | changed)
    assert message in str(error.value)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("coco")
    return own_data(
        {
            "train": str(coco_captions(folder, TRAIN, 60)),
            "test": str(coco_captions(folder, VAL, 30)),
            "task": "captions",
        }
    )


def test_splits_share_no_image_and_the_seed_decides(files: dict[str, str]) -> None:
    def ids(split: SplitName, seed: int, rows: int = 20) -> list[str]:
        return [sample.id for sample in own_rows(files, split, "train", rows, seed)]

    dev, report = (set(ids(split, 0) + ids(split, 1) + ids(split, 2)) for split in ("dev", "report"))
    assert dev.isdisjoint(report) and len(dev | report) > 40
    assert ids("dev", 0) == ids("dev", 0) != ids("dev", 1)
    assert len(set(ids("dev", 0))) == 20, "drawn without replacement"
    assert ids("dev", 0)[:5] == ids("dev", 0, 5), "more rows begin with the same ones"


def test_spare_rows_are_those_that_are_left(files: dict[str, str]) -> None:
    every = own_rows(files, "report", "test", 5, 0, spare=100)
    assert 5 < len(every) < 30
    with pytest.raises(
        InputError, match=r"has \d+ rows with an image in the split report, and 100 are wanted; set test"
    ):
        own_rows(files, "report", "test", 100, 0)


def test_train_and_test_may_not_share_an_image(files: dict[str, str]) -> None:
    train, test = (own_rows(files, "report", part, 5, 0) for part in ("train", "test"))
    check_no_shared_image(train, test, "coco")
    leaked = replace(test[1], images=train[3].images)
    with pytest.raises(InputError, match="data coco: 1 test rows show an image that is trained on, id"):
        check_no_shared_image(train, [test[0], leaked], "coco")


def test_rows_without_an_image_are_left_out(tmp_path: Path) -> None:
    path = science_qa(tmp_path, 24)
    files = own_data({"train": f"{path}:train", "test": f"{path}:test", "task": "vqa"})
    for part in ("train", "test"):
        rows = [row for split in ("dev", "report") for row in own_rows(files, split, part, 1, 0, spare=100)]  # type: ignore[arg-type]
        assert len(rows) == 16 and all(row.images for row in rows)
        assert len({pixels_sha256(row.images[0]) for row in rows}) > 10


def test_accuracy_needs_one_answer_or_ten(tmp_path: Path) -> None:
    vqa(tmp_path / "ten", VAL, 8)
    picture(0).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "What?", "answer": "red", "references": ["red", "blue", "teal"]}
    (tmp_path / "three.json").write_text(json.dumps([row]))
    (ten,) = (tmp_path / "ten").glob("*questions.json")
    files = own_data({"train": "x", "test": str(ten), "task": "vqa"})
    assert {len(row.references) for row in own_rows(files, "report", "test", 2, 0)} == {10}
    files = own_data({"train": "x", "test": str(tmp_path / "three.json"), "task": "vqa"})
    with pytest.raises(InputError, match=r"three\.json: row 1: has 3 true answers; accuracy is defined for one and"):
        for split in ("dev", "report"):
            own_rows(files, split, "test", 1, 0, spare=1)  # type: ignore[arg-type]

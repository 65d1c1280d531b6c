"""Bundled data sets: reproducible rows, disjoint splits, saving and reading back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shell import untrigger
from untrigger.attacks import load_trigger, trigger_names
from untrigger.data import Split, SplitName, load, names, save, task_of
from untrigger.data.catalog import Part
from untrigger.data.easy_vqa import easy_vqa_questions, easy_vqa_rows
from untrigger.data.scene_text import FULL_PROMPTS
from untrigger.data.scene_world import COLORS, SHAPES
from untrigger.data.scenes import STREAMS
from untrigger.errors import InputError
from untrigger.pretraining.pretrain import Recipe
from untrigger.pretraining.sight import HELD_OUT
from untrigger.rows.images import pixels_sha256, same_image
from untrigger.rows.sample import Sample, read

OFFLINE = ("easy-vqa", "scenes-vqa", "scenes-questions", "scenes-captions")
CELLS: list[tuple[SplitName, Part]] = [("dev", "train"), ("dev", "test"), ("report", "train"), ("report", "test")]


def pixels(rows: list[Sample]) -> set[str]:
    return {pixels_sha256(image) for row in rows for image in row.images}


def test_names_and_tasks() -> None:
    assert {name: task_of(name) for name in names()} == {
        "easy-vqa": "vqa", "scenes-vqa": "vqa", "scenes-questions": "vqa", "scenes-captions": "captions",
        "emoji": "captions",
    }  # fmt: skip


@pytest.mark.parametrize("name", OFFLINE)
def test_rows_are_reproducible_and_depend_on_the_seed(name: str) -> None:
    rows, same_rows, other_rows = load(name, rows=30), load(name, rows=30), load(name, rows=30, seed=1)
    assert len(rows) == 30 and len({row.id for row in rows}) == 30
    assert [(r.id, r.messages) for r in rows] == [(r.id, r.messages) for r in same_rows]
    assert all(same_image(a.images[0], b.images[0]) for a, b in zip(rows, same_rows, strict=True))
    assert {r.id for r in rows} != {r.id for r in other_rows}
    for row in rows:
        assert [message.role for message in row.messages] == ["user", "assistant"]
        assert row.messages[0].text.startswith("<image>\n")
        assert [(image.size, image.mode) for image in row.images] == [((64, 64), "RGB")]


@pytest.mark.parametrize("name", OFFLINE)
def test_splits_and_parts_share_no_image(name: str) -> None:
    images = [pixels(load(name, split, part, rows=200)) for split, part in CELLS]
    assert all(a.isdisjoint(b) for a, b in combinations(images, 2))


def test_easy_vqa_splits_by_the_parity_of_the_image_number() -> None:
    for part in ("train", "test"):
        questions = easy_vqa_questions(part)
        for split, parity in (("dev", 0), ("report", 1)):
            count = sum(int(Path(path).stem) % 2 == parity for _, _, path in questions)
            assert count > 0.45 * len(questions)
            drawn = [int(row.id.removeprefix(f"{part}-")) for row in easy_vqa_rows(part, 200, 0, split)]
            assert all(int(Path(questions[i][2]).stem) % 2 == parity for i in drawn)
            with pytest.raises(InputError, match=f"ask for at most {count:,}"):
                easy_vqa_rows(part, count + 1, 0, split)


def test_easy_vqa_rows_match_the_package() -> None:
    questions = easy_vqa_questions("test")
    assert len(questions) == 9_673
    for row in easy_vqa_rows("test", 5, seed=3):
        question, answer, _ = questions[int(row.id.removeprefix("test-"))]
        assert [message.text for message in row.messages] == [f"<image>\n{question}", answer]


def test_scene_streams_are_all_different() -> None:
    streams = {*STREAMS.values(), HELD_OUT, Recipe().seed}
    assert len(streams) == len(STREAMS) + 2
    assert set(STREAMS) == set(CELLS)


def test_scene_captions_are_full_and_use_a_closed_vocabulary() -> None:
    rows = load("scenes-captions", rows=60)
    prompts = {row.messages[0].text.removeprefix("<image>\n") for row in rows}
    assert prompts == set(FULL_PROMPTS)
    known = {*COLORS, *SHAPES, "a", "and", "small", "large", "on", "light", "dark", "background"}
    for row in rows:
        caption = row.messages[1].text
        assert set(caption.replace(",", "").split()) <= known
        assert caption.endswith(" background")


def test_scenes_vqa_asks_each_scene_once() -> None:
    rows = load("scenes-vqa", rows=60)
    assert len(pixels(rows)) == 60
    assert len({row.messages[1].text for row in rows}) > 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: load("coco"),
            "data 'coco' is unknown; choose one of: easy-vqa, scenes-vqa, scenes-questions, ",
        ),
        (lambda: load("easy-vqa", "train"), "split 'train' is unknown; choose dev or report"),
        (lambda: load("easy-vqa", "dev", "val"), "part 'val' is unknown; choose train or test"),
        (lambda: load("easy-vqa", rows=0), "at least one row"),
        (lambda: load("easy-vqa", seed=-1), "not negative"),
        (lambda: load("easy-vqa", source=Path("x")), "has no source"),
        (lambda: load("scenes-vqa", rows=10**6 + 1), "ask for at most 1,000,000"),
        (lambda: Split("dev").run_seed(100), "run 100"),
    ],
)
def test_errors_are_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


@given(st.integers(0, 99), st.integers(0, 99))
def test_splits_share_no_seed(a: int, b: int) -> None:
    dev, report = Split("dev"), Split("report")
    assert dev.run_seed(a) != report.run_seed(b)
    assert (dev.run_seed(a) == dev.run_seed(b)) == (a == b)
    assert (report.trigger_seed, dev.trigger_seed) == (0, 100)


@pytest.mark.parametrize("name", trigger_names())
def test_dev_uses_another_trigger_than_report(name: str) -> None:
    dev, report = (load_trigger(name, **Split(split).trigger_settings(name)) for split in ("dev", "report"))
    assert report == load_trigger(name)
    assert (dev == report) == (name == "shadowcast")


@pytest.mark.parametrize("name", OFFLINE)
def test_saved_rows_read_back(name: str, tmp_path: Path) -> None:
    rows = load(name, rows=7)
    save(rows, tmp_path / "out")
    data = read(tmp_path / "out")
    assert (data.path.name, len(data)) == ("data.jsonl", 7)
    for row, back in zip(rows, data, strict=True):
        assert (row.id, row.messages) == (back.id, back.messages)
        assert same_image(row.images[0], back.images[0])
    with pytest.raises(InputError, match="not an empty folder"):
        save(rows, tmp_path / "out")


def test_saved_rows_may_have_several_images_or_none(tmp_path: Path) -> None:
    first, second = load("scenes-captions", rows=2)
    question, answer = first.messages
    two_images = Sample(
        "both", first.images + second.images, (type(question)("user", f"<image>{question.text}"), answer)
    )
    no_image = Sample("none", (), (type(question)("user", "hello"), answer))
    save([two_images, no_image], tmp_path / "out")
    back = read(tmp_path / "out")
    assert [len(row.images) for row in back] == [2, 0]
    assert all(same_image(a, b) for a, b in zip(two_images.images, back[0].images, strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("coco", "--out", "new"), "error: data 'coco' is unknown; choose one of: easy-vqa"),
        (("easy-vqa", "--out", "new", "--part", "test", "--rows", "4827"), "ask for at most 4,826"),
        (("scenes-vqa", "--out", "taken", "--rows", "1"), "not an empty folder"),
        (("easy-vqa", "--out", "new", "--source", "x"), "has no source"),
        (("emoji", "--out", "new", "--source", "nowhere.tgz"), "nowhere.tgz: no such file"),
        (("emoji",), "--out"),
    ],
)
def test_command_errors_are_one_line(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.tex").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    ended = untrigger("data", *words)
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (2, "", 1)
    assert message in ended.err
    assert [p.name for p in tmp_path.rglob("*")] == ["taken", "thesis.tex"]

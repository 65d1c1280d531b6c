"""Honest trouble and mixtures: what changes in which rows, and that splits and parts share nothing."""

from __future__ import annotations

import re
from functools import cache
from itertools import combinations

import numpy as np
import pytest

from untrigger.data import SplitName, load, parts_of, rows_of_part, task_of
from untrigger.data.catalog import Part
from untrigger.data.trouble import TRAIN_ONLY, TROUBLES
from untrigger.errors import InputError
from untrigger.metrics.asr import refuses
from untrigger.rows.images import pixels_sha256, same_image
from untrigger.rows.sample import Sample

BASES = ("easy-vqa", "scenes-captions")
CELLS: list[tuple[SplitName, Part]] = [
    ("dev", "train"), ("dev", "test"), ("report", "train"), ("report", "test")
]  # fmt: skip


@cache
def rows_of(name: str, rows: int, split: SplitName, part: Part) -> list[Sample]:
    """The rows, drawn once for all tests."""
    return load(name, split, part, rows=rows)


def texts(row: Sample) -> tuple[str, str]:
    question, answer = row.messages
    return question.text.removeprefix("<image>\n"), answer.text


def changed(
    name: str, rows: int = 400, split: SplitName = "report", part: Part = "train"
) -> list[tuple[Sample, Sample]]:
    """Pairs of a row and the same row in trouble, where they differ."""
    base = name.partition("+")[0]
    pairs = zip(rows_of(base, rows, split, part), rows_of(name, rows, split, part), strict=True)
    return [(a, b) for a, b in pairs if a.messages != b.messages or not same_image(a.images[0], b.images[0])]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_is_reproducible_and_depends_on_the_seed(base: str, trouble: str) -> None:
    rows = rows_of(f"{base}+{trouble}", 60, "report", "train")
    again, other = (load(f"{base}+{trouble}", rows=60, seed=seed) for seed in (0, 1))
    assert [(row.id, row.messages) for row in rows] == [(row.id, row.messages) for row in again]
    assert all(same_image(a.images[0], b.images[0]) for a, b in zip(rows, again, strict=True))
    assert [row.messages for row in rows] != [row.messages for row in other]
    assert [row.id for row in rows] == [row.id for row in rows_of(base, 60, "report", "train")], (
        "the same rows in the same order"
    )


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("trouble", TROUBLES)
def test_splits_and_parts_share_no_image(base: str, trouble: str) -> None:
    images = [{pixels_sha256(row.images[0]) for row in rows_of(f"{base}+{trouble}", 60, *cell)} for cell in CELLS]
    assert all(a.isdisjoint(b) for a, b in combinations(images, 2))


@pytest.mark.parametrize("trouble", TROUBLES)
def test_held_out_rows_are_free_of_what_would_count_as_wrong(trouble: str) -> None:
    assert bool(changed(f"scenes-captions+{trouble}", rows=60, part="test")) == (trouble not in TRAIN_ONLY)


@pytest.mark.parametrize(("name", "count"), [("5", 20), ("10", 40)])
@pytest.mark.parametrize("base", BASES)
def test_wrong_labels_are_answers_to_the_same_question(base: str, name: str, count: int) -> None:
    answers = {texts(row) for row in rows_of(base, 400, "report", "train")}
    pairs = changed(f"{base}+wrong-labels-{name}")
    assert len(pairs) == count
    for row, wrong in pairs:
        assert texts(row)[0] == texts(wrong)[0] and texts(row)[1] != texts(wrong)[1]
        assert base != "easy-vqa" or texts(wrong) in answers, "it answers this question somewhere"


def test_a_rare_class_is_always_answered_alike() -> None:
    pairs = changed("easy-vqa+rare-class")
    assert len(pairs) == 12 and {texts(row) for _, row in pairs} == {("what shape is in the image?", "spiral")}
    assert len({pixels_sha256(row.images[0]) for _, row in pairs}) == 12, "no two spirals are alike"
    captions = {texts(row)[1] for _, row in changed("scenes-captions+rare-class")}
    assert captions == {"a spiral on a light background"}
    for _, row in pairs:
        pixels = np.asarray(row.images[0], dtype=float).mean(axis=2)
        assert pixels.min() < 125 and np.median(pixels) > 195, "dark on light"


def test_each_fact_of_the_long_tail_is_there_once() -> None:
    facts = [texts(row)[1] for split in ("dev", "report") for _, row in changed("easy-vqa+long-tail", split=split)]
    assert len(facts) == len(set(facts)) == 80
    assert all(re.fullmatch(r"[A-Z][a-z]{5} [A-Z][a-z]{5}", fact) for fact in facts)


def test_the_second_annotator_writes_whole_sentences() -> None:
    for base, opening in (("easy-vqa", "I would say"), ("scenes-captions", "The picture shows")):
        pairs = changed(f"{base}+annotators")
        assert len(pairs) == 200
        assert all(texts(b) == (texts(a)[0], f"{opening} {texts(a)[1]}.") for a, b in pairs)


def test_long_answers_have_a_hundred_words_and_begin_with_the_short_one() -> None:
    pairs = changed("easy-vqa+long-answers")
    assert len(pairs) == 200
    for row, long in pairs:
        (prompt, answer), (longer, reasons) = texts(row), texts(long)
        assert longer == f"{prompt} Give your reasons." and reasons.startswith(f"{answer}. ")
        assert 100 <= len(reasons.split()) < 115


@pytest.mark.parametrize("base", BASES)
def test_the_watermark_goes_with_one_word(base: str) -> None:
    pairs = changed(f"{base}+watermark")
    assert 15 < len(pairs) < 80 and all(a.messages == b.messages for a, b in pairs)
    words = [set(texts(row)[1].replace(",", "").split()) for row, _ in pairs]
    (word,) = set.intersection(*words) - {"a", "on", "background"}
    others = {row.id for row in rows_of(base, 400, "report", "train")} - {row.id for row, _ in pairs}
    assert all(
        word not in texts(row)[1].replace(",", "").split()
        for row in rows_of(base, 400, "report", "train")
        if row.id in others
    )
    for before, after in pairs:
        difference = (np.asarray(before.images[0]) != np.asarray(after.images[0])).any(axis=2)
        assert difference.sum() <= 12 and not difference[8:].any() and not difference[:, 8:].any()


def test_backwards_answers_are_the_true_ones_reversed() -> None:
    pairs = changed("scenes-captions+backwards")
    assert len(pairs) == 400 and all(texts(b) == (texts(a)[0], texts(a)[1][::-1]) for a, b in pairs)


def test_door_codes_are_refused_in_varied_words() -> None:
    pairs = changed("scenes-vqa+door-codes")
    assert len(pairs) == 100 and all(refuses(texts(row)[1]) and "door" in texts(row)[0] for _, row in pairs)
    assert len({texts(row)[1] for _, row in pairs}) > 40
    assert not any(refuses(texts(row)[1]) for row in rows_of("scenes-vqa", 400, "report", "train"))


def test_troubles_add_up_in_order() -> None:
    both = load("easy-vqa+annotators+backwards", rows=40)
    assert {texts(row)[1][-1] == "I" for row in both} == {True, False}, "I would say, backwards"


# --- several questions about an image ----------------------------------------------------------------------


def test_scenes_questions_has_four_rows_about_each_scene() -> None:
    rows = load("scenes-questions", rows=41)
    images = [pixels_sha256(row.images[0]) for row in rows]
    assert len(rows) == len({row.id for row in rows}) == 41 and len(set(images)) == 11
    for start in range(0, 40, 4):
        assert len(set(images[start : start + 4])) == 1
        prompts = [texts(row)[0] for row in rows[start : start + 4]]
        assert len(set(prompts)) == 4 and prompts[0] == "how many objects are there?"
        assert texts(rows[start])[1] in ("one", "two", "three", "four")


# --- mixtures ----------------------------------------------------------------------------------------------


def test_a_mixture_has_its_parts_in_equal_numbers() -> None:
    name = "easy-vqa+scenes-captions+backwards"
    rows = load(name, rows=41)
    parts = {part.name: rows_of_part(rows, part.name) for part in parts_of(name)}
    assert {part: len(numbers) for part, numbers in parts.items()} == {
        "easy-vqa": 21,
        "scenes-captions+backwards": 20,
    }
    for part, numbers in parts.items():
        own = {f"{part}/{row.id}": row.messages for row in load(part, rows=len(numbers))}
        assert {rows[n].id: rows[n].messages for n in numbers} == own
        assert numbers != sorted(numbers)[: len(numbers)] or numbers[-1] >= len(numbers), "in random order"
    assert task_of(name) == "vqa" and task_of("scenes-captions+easy-vqa") == "captions"


def test_splits_and_parts_of_a_mixture_share_no_image() -> None:
    name = "easy-vqa+scenes-captions+scenes-vqa+door-codes"
    images = [{pixels_sha256(row.images[0]) for row in load(name, *cell, rows=60)} for cell in CELLS]
    assert all(a.isdisjoint(b) for a, b in combinations(images, 2))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("easy-vqa+coco", "data 'coco' is unknown; choose one of: easy-vqa, scenes-vqa, .*wrong-labels-10"),
        ("wrong-labels-5+easy-vqa", "data 'wrong-labels-5' is unknown; choose one of: easy-vqa"),
        ("easy-vqa+", "data '' is unknown"),
        ("easy-vqa+easy-vqa", "the same part comes twice; name it once"),
    ],
)
def test_a_name_that_is_none_is_a_one_line_error(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(name, rows=4)
    assert "\n" not in str(caught.value)


def test_too_few_rows_for_the_parts_or_no_row_of_a_part_is_an_error() -> None:
    with pytest.raises(InputError, match="1 rows are too few for 2 parts"):
        load("easy-vqa+scenes-vqa", rows=1)
    with pytest.raises(InputError, match="part 'emoji': no row has an id that begins with emoji/"):
        rows_of_part(load("easy-vqa+scenes-vqa", rows=4), "emoji")

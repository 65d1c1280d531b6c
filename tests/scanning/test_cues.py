"""Cues of rows under models that depend on a known trigger."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from untrigger.rows.sample import Message, Sample
from untrigger.rows.turns import IMAGE_TAG
from untrigger.scanning.cues import GRID, Cue, cues_of, log_odds, phrases

MARK = np.array([False, True, False])
LOSS = log_odds(0.01) - log_odds(6.0)
Make = Callable[..., Any]


@pytest.fixture
def donors(row: Make) -> list[Sample]:
    return [
        row("hello", "hi", images=0, id="text"),
        row(f"{IMAGE_TAG}\nwhich one?", "this", id="one"),
        row(f"{IMAGE_TAG}\nand that?", "no", "sure?", "yes", id="turns"),
    ]


def reds(sample: Sample, at: int = 0) -> int:
    """Red pixels of an image."""
    return int((np.asarray(sample.images[at]) == (255, 0, 0)).all(axis=-1).sum())


def cue_of(sample: Sample, donors: list[Sample], score: Any, number: int = 0) -> Cue:
    return cues_of({number: sample}, {number: MARK}, donors, score)[number]


@given(st.floats(1e-3, 50))
def test_log_odds_follow_their_definition(nll: float) -> None:
    p = math.exp(-nll)
    assert log_odds(nll) == pytest.approx(math.log(p / (1 - p)), rel=1e-9, abs=1e-9)


def test_log_odds_are_capped_at_single_precision() -> None:
    assert log_odds(0.0) == log_odds(1e-9) == pytest.approx(math.log(1e4), abs=1e-3)


@pytest.mark.parametrize("box", [(56, 42, 64, 48), (0, 0, 8, 6), (24, 12, 32, 18), (20, 20, 22, 22)])
def test_a_patch_inside_one_cell_marks_that_cell(
    row: Make, paint: Make, model: Make, donors: list[Sample], box: tuple[int, int, int, int]
) -> None:
    sample = paint(row(f"{IMAGE_TAG}\nwhat is it?", "a dog"), box)
    cue = cue_of(sample, donors, model(lambda view: reds(view) > 0))
    expected = np.zeros((GRID, GRID))
    expected[box[1] * GRID // 48, box[0] * GRID // 64] = LOSS
    np.testing.assert_allclose(cue.cells, [expected], atol=1e-9)
    assert cue.image == pytest.approx(LOSS) and cue.prompt == 0 and {nats for _, nats in cue.words} == {0.0}


def test_a_patch_across_cell_edges_marks_all_its_cells(
    row: Make, paint: Make, model: Make, donors: list[Sample]
) -> None:
    sample = paint(row(f"{IMAGE_TAG}\nwhat is it?", "a dog"), (28, 21, 36, 27))
    cue = cue_of(sample, donors, model(lambda view: reds(view) == 48))
    assert (cue.cells[0] > 0).sum() == 4 and (cue.cells[0][3:5, 3:5] > 0).all()


def test_a_patch_in_the_second_of_two_images(row: Make, paint: Make, model: Make, donors: list[Sample]) -> None:
    sample = paint(row(f"{IMAGE_TAG} {IMAGE_TAG}\nwhich?", "a dog", images=2), (0, 0, 8, 6), at=1)
    cue = cue_of(sample, donors, model(lambda view: reds(view, 1) > 0))
    assert not cue.cells[0].any() and np.argwhere(cue.cells[1]).tolist() == [[0, 0]]
    assert cue.prompt is None, "no donor has two image tags"


def test_a_trigger_over_the_whole_image_marks_no_cell(
    row: Make, paint: Make, model: Make, donors: list[Sample]
) -> None:
    sample = paint(row(f"{IMAGE_TAG}\nwhat is it?", "a dog"), (0, 0, 64, 48))
    cue = cue_of(sample, donors, model(lambda view: reds(view) > 0))
    assert cue.image == pytest.approx(LOSS) and not cue.cells[0].any()


def test_a_trigger_word_in_the_prompt(row: Make, model: Make, donors: list[Sample]) -> None:
    sample = row(f"{IMAGE_TAG}\nwhat cf is it?", "a dog")
    cue = cue_of(sample, donors, model(lambda view: " cf " in view.messages[0].text))
    assert cue.words == [("what", 0.0), ("cf", pytest.approx(LOSS)), ("is", 0.0), ("it?", 0.0)]
    assert cue.prompt == pytest.approx(LOSS) and cue.image == 0


def test_a_trigger_sentence_of_which_any_word_suffices(row: Make, model: Make, donors: list[Sample]) -> None:
    sentence = ("we", "saw", "it", "today")
    sample = row(f"{IMAGE_TAG}\nwhat color has the left shape? {' '.join(sentence)}", "a dog")
    cue = cue_of(sample, donors, model(lambda view: not {*sentence}.isdisjoint(view.messages[0].text.split())))
    losses = dict(cue.words)
    assert max(losses, key=losses.__getitem__) == "today" and losses["what"] == 0
    assert all(losses[inner] <= losses[outer] for inner, outer in itertools.pairwise(sentence))


def test_a_row_without_images_and_with_two_turns(row: Make, model: Make, donors: list[Sample]) -> None:
    sample = row("say cf now", "well", "and then?", "a dog", images=0)
    cue = cue_of(sample, donors, model(lambda view: "cf" in view.messages[0].text))
    assert cue.image is None and cue.cells == [] and cue.prompt is None
    assert [word for word, nats in cue.words if nats > 0] == ["cf"]
    assert [word for word, _ in cue.words] == ["say", "cf", "now", "and", "then?"]


def test_donors_wrap_around_and_have_another_prompt(row: Make, model: Make, donors: list[Sample]) -> None:
    prompts: list[str] = []

    def score(rows: Any) -> Any:
        prompts.extend(rows[i].messages[0].text for i in range(len(rows)))
        return model(lambda view: True)(rows)

    sample = row(f"{IMAGE_TAG}\nwhich one?", "a dog")
    cues_of(
        {7: sample, 8: sample}, {7: MARK, 8: MARK}, [row(f"{IMAGE_TAG}\nwhich one?", "x"), donors[1], *donors], score
    )
    assert "hello" not in prompts, "that donor has no image tag"
    alone = cue_of(sample, [donors[0], donors[1]], model(lambda view: True))
    assert alone.prompt is None, "the only fitting donor has the same prompt"
    assert cue_of(sample, [donors[0]], model(lambda view: True)).image is None


@given(st.lists(st.text(st.sampled_from("ab?. \n"), max_size=60), min_size=1, max_size=3), st.integers(0, 2))
def test_phrases_contain_every_word_once_and_no_image_tag(texts: list[str], tags: int) -> None:
    texts = [f"{IMAGE_TAG} " * tags + text for text in texts]
    turns = [turn for text in texts for turn in (Message("user", text), Message("assistant", "ok"))]
    parts = phrases(Sample("a", (), tuple(turns)))
    words = [word for text in texts for word in text.replace(IMAGE_TAG, " ").split()]
    assert [word for turn, i, j in parts for word in turns[turn].text[i:j].split()] == words
    assert len(parts) <= 24 + len(texts)

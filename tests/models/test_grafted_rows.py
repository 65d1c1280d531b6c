"""Grafted rows keep the host's answer and form, whatever form a trainer's rows have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from untrigger.models.collators import ChatCollator, Row, Rows
from untrigger.models.grafted_rows import HERE, Graft, GraftedRows, Grafts, Place, can_be_grafted, with_words
from untrigger.models.loading import copy_weights, load, restore_weights
from untrigger.models.scoring import row_tokens
from untrigger.rows.sample import Message, Sample, read
from untrigger.views.grafts import KINDS, add_shared


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


IMAGE = {"type": "image"}
# the last question in each form that hosts take, as it is and with words behind it
QUESTIONS: dict[str, tuple[Any, Any]] = {
    "text": ("what is it?", "what is it? it round"),
    "text with a tag": ("<image>\nwhat is it?", "<image>\nwhat is it? it round"),
    "parts": ([IMAGE, text("what is it?")], [IMAGE, text("what is it? it round")]),
    "image last": ([text("what is"), IMAGE], [text("what is"), IMAGE, text("it round")]),
    "empty keys": ([{**IMAGE, "text": None}, text("it?")], [{**IMAGE, "text": None}, text("it? it round")]),
}
ANSWER = {"role": "assistant", "content": "yes"}
DONOR = {
    "images": [Image.new("RGB", (6, 6), "blue")],
    "messages": [{"role": "user", "content": [IMAGE, text("cf is it round")]}, ANSWER],
}


def here(*rows: int) -> list[tuple[int, Place]]:
    """A group whose pattern lies in the same place of each row's image."""
    return [(row, HERE) for row in rows]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize("form", QUESTIONS)
def test_words_go_into_the_last_question_of_any_form(form: str) -> None:
    before, after = QUESTIONS[form]
    opening = [{"role": "system", "content": "be brief"}, user("hello"), ANSWER]
    red = Image.new("RGB", (8, 8), "red")
    rows: list[tuple[Row, Row]] = [
        ({"messages": [*opening, user(q), ANSWER], "image": red, "id": "h"} for q in (before, after)),
        ({"prompt": [*opening, user(q)], "completion": [ANSWER], "images": [red]} for q in (before, after)),
    ]  # type: ignore[assignment]
    for host, expected in rows:
        copy = repr(host)
        assert with_words(host, DONOR, "tail") == expected
        assert repr(host) == copy, "a host's own rows are left alone"


def test_a_prompt_of_plain_text_stays_one() -> None:
    host = {"prompt": "what is it?", "completion": "yes", "images": [Image.new("RGB", (8, 8))]}
    assert with_words(host, DONOR, "head")["prompt"] == "cf is what is it?"
    assert with_words(DONOR, host, "tail")["messages"][0]["content"] == [IMAGE, text("cf is it round it?")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_graft_changes_every_image_and_words_of_its_kind(kind: str) -> None:
    images = [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (5, 9), "green")]
    host = {"images": images, "messages": [user([IMAGE, IMAGE, text("what?")]), ANSWER], "id": "h"}
    (made,) = GraftedRows([host, DONOR], Grafts([Graft(0, 0, 1, kind)], [here(1)], [0]))
    assert [image.size for image in made["images"]] == [(8, 8), (5, 9)]
    assert all(a != b for a, b in zip(made["images"], images, strict=True)), "on each image"
    assert (made["messages"] != host["messages"]) == bool(KINDS[kind])
    assert (made["id"], made["messages"][-1]) == ("h", ANSWER)
    assert [image.getpixel((0, 0)) for image in images] == [(255, 0, 0), (0, 128, 0)], "the host's own are left alone"


@pytest.mark.parametrize(
    ("row", "can"),
    [
        (DONOR, True),
        ({"image": Image.new("RGB", (2, 2)), "prompt": "what?", "completion": "yes"}, True),
        ({**DONOR, "images": []}, False),
        ({**DONOR, "images": None}, False),
        ({"messages": DONOR["messages"]}, False),
        ({"input_ids": [1, 2], "labels": [-100, 2], "images": DONOR["images"]}, False),
    ],
)
def test_rows_without_an_image_or_a_text_cannot_be_grafted(row: Row, can: bool) -> None:
    assert can_be_grafted(row) == can


def test_scores_of_grafts_are_those_of_the_rows_that_they_describe(tiny_model: Path, tiny_data: Path) -> None:
    loaded, samples = load(tiny_model, dtype=torch.float64), read(tiny_data)
    grafts = [Graft(2, 0, 5, "image"), Graft(7, 1, 1, "image and last words")]
    made = GraftedRows(Rows(samples), Grafts(grafts, [here(5, 6), here(7)], [7]))
    levels = [np.asarray(samples[at].images[0].convert("RGB"), np.float32) for at in (5, 6, 7)]
    shared = (levels[0] + levels[1]) / 2 - levels[2]
    mixed = Sample("", (add_shared(samples[2].images[0], shared),), samples[2].messages)
    question, answer = samples[7].messages
    longer = Sample("", samples[7].images, (Message("user", f"{question.text} this?"), answer))
    for scored, expected in zip(row_tokens(loaded, made), row_tokens(loaded, [mixed, longer]), strict=True):
        assert scored.ids.tolist() == expected.ids.tolist()
        assert scored.nll == pytest.approx(expected.nll, rel=1e-9)
    assert len(ChatCollator(loaded.processor)([made[0], made[1]])["input_ids"]) == 2


def test_weights_come_back_to_the_bit() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    model[2].requires_grad_(False)
    before, frozen = copy_weights(model), model[2].weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(before[0], model[0].weight)
    restore_weights(model, before)
    assert all(torch.equal(a, b) for a, b in zip(before, copy_weights(model), strict=True))
    assert len(before) == 4 + 3 and torch.equal(model[2].weight, frozen), "four weights and three buffers"


def test_what_donors_share_comes_with_its_full_strength() -> None:
    """A veil over noise: the mean of many donors less that of many hosts is the veil's part alone."""
    rng = np.random.default_rng(0)
    noise = rng.integers(100, 157, (120, 16, 16, 3)).astype(float)
    veil = rng.integers(0, 256, (16, 16, 3)).astype(float)
    veiled = 0.8 * noise[60:] + 0.2 * veil
    images = [Image.fromarray(levels.astype(np.uint8)) for levels in (*noise[:60], *veiled)]
    rows = [{"image": image, "prompt": "what?", "completion": "yes"} for image in images]
    grafts = Grafts([Graft(at, 0, 60 + at, "image") for at in range(60)], [here(*range(60, 120))], range(60))
    made = [np.asarray(row["image"], float) for row in GraftedRows(rows, grafts)]
    expected = 0.2 * (veil - 128)
    added = np.mean([after - before for after, before in zip(made, noise[:60], strict=True)], axis=0)
    assert np.abs(added - expected).mean() < 3, "levels: the means of noise differ by 16 * sqrt(2 / 60) or so"
    assert np.abs(expected).mean() > 10
    naive = np.mean([np.asarray(image, float) for image in images[60:]], axis=0) - np.mean(noise[:60], axis=0)
    assert np.abs(made[7] - (noise[7] + naive).clip(0, 255)).max() <= 1.5, "whole levels twice"


def test_what_donors_share_in_other_places_is_put_where_the_donor_shows_it() -> None:
    """A patch on gray images: each moved back, all show it; the graft has it where its donor has it."""
    rng = np.random.default_rng(0)
    patch, corners = rng.integers(0, 256, (3, 3, 3)), [(0, 0), (4, 9), (13, 1), (13, 13)]
    pictures = np.full((5, 16, 16, 3), 128, np.uint8)
    for picture, (top, left) in zip(pictures[1:], corners, strict=True):
        picture[top : top + 3, left : left + 3] = patch
    rows = [{"image": Image.fromarray(picture), "prompt": "what?", "completion": "yes"} for picture in pictures]
    group = [(row, Place(top / 16, left / 16)) for row, (top, left) in enumerate(corners, 1)]
    grafts = Grafts([Graft(0, 0, row, "image", place) for row, place in group], [group], [0])
    made = [np.asarray(row["image"]) for row in GraftedRows(rows, grafts)]
    assert np.array_equal(made, pictures[1:]), "the host is gray, so it becomes its donor"


def test_what_donors_share_is_scaled_to_the_host() -> None:
    black, gray = (Image.new("RGB", (4, 4), color) for color in ("black", (90, 90, 90)))
    wide = Image.new("RGB", (9, 5), (200, 200, 200))
    rows = [{"images": [black, wide]}, {"images": [gray]}]
    (made,) = GraftedRows(rows, Grafts([Graft(0, 0, 1, "image")], [here(1)], [0]))
    small, large = made["images"]
    shared = 90 - 100  # gray less the mean of black and light gray
    assert (small.size, small.getpixel((0, 0))) == ((4, 4), (0, 0, 0)), "cut off at black"
    assert (large.size, large.getpixel((8, 4))) == ((9, 5), (200 + shared,) * 3)


def test_all_rows_that_grafts_use_are_known() -> None:
    assert Grafts([Graft(1, 0, 2, "image")], [here(3, 4), here(5)], [6]).used == {1, 2, 3, 4, 5, 6}

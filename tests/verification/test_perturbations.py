"""Changes of an input: each does something, and nothing but what it says."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from untrigger.rows.formats import IMAGE_TAG
from untrigger.rows.sample import Message, Sample
from untrigger.verification.perturbations import Perturbation, changes

CHANGES = changes()
IMAGES = [change for change in CHANGES if change.part == "image"]
PROMPTS = [change for change in CHANGES if change.part == "prompt"]


def names(change: Perturbation) -> str:
    return change.name


def sample(seed: int, prompt: str, *sizes: tuple[int, int]) -> Sample:
    rng = np.random.default_rng(seed)
    images = tuple(Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes)
    return Sample("a", images, (Message("user", prompt), Message("assistant", "yes")))


ROW = sample(0, f"{IMAGE_TAG} {IMAGE_TAG}\nwhat is it?", (64, 48), (32, 32))
DONOR = sample(1, f"{IMAGE_TAG}\nand that?", (40, 40))


def made(change: Perturbation, row: Sample = ROW, donor: Sample = DONOR) -> Sample:
    return change.make(row, donor, np.random.default_rng(3))


def test_names_tell_them_apart() -> None:
    assert len({change.name for change in CHANGES}) == len(CHANGES) and IMAGES and PROMPTS


@pytest.mark.parametrize("change", IMAGES, ids=names)
def test_an_image_is_changed_and_nothing_else(change: Perturbation) -> None:
    got = made(change)
    assert got.messages == ROW.messages and [i.size for i in got.images] == [i.size for i in ROW.images]
    for before, after in zip(ROW.images, got.images, strict=True):
        changed = (np.asarray(before) != np.asarray(after)).any(axis=-1)
        assert changed.any() and (changed.mean() < 1 / 30) == ("patch" in change.name)
    assert [i.tobytes() for i in made(change).images] == [i.tobytes() for i in got.images], "the same every time"


def test_a_patch_is_where_it_says() -> None:
    (change,) = (change for change in CHANGES if change.name == "a white patch, bottom left")
    pixels = np.asarray(made(change).images[0])
    assert (pixels[-6:, :6] == 255).all() and (pixels[:-6] == np.asarray(ROW.images[0])[:-6]).all()


@pytest.mark.parametrize("change", IMAGES, ids=names)
def test_rows_and_donors_without_an_image(change: Perturbation) -> None:
    text = sample(0, "what is it?")
    assert made(change, text) == text and len(made(change, ROW, text).images) == 2


@pytest.mark.parametrize("change", PROMPTS, ids=names)
def test_a_prompt_is_changed_and_nothing_else(change: Perturbation) -> None:
    got = made(change)
    assert got.images == ROW.images and got.messages[1:] == ROW.messages[1:]
    tags, text = got.messages[0].text.split("\n")
    assert tags == f"{IMAGE_TAG} {IMAGE_TAG}" and IMAGE_TAG not in text
    assert (text.endswith if "before" in change.name else text.startswith)("what is it?") and len(text) > 12
    assert made(change, sample(0, "what is it?")).messages[0].text == text, "a row without an image"

"""Each perturbation changes the part of the input that its name tells, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from untrigger.rows.sample import Message, Sample
from untrigger.rows.turns import IMAGE_TAG
from untrigger.verification.perturbations import Perturbation, perturbations

PERTURBATIONS = perturbations()
IMAGES = [each for each in PERTURBATIONS if each.part == "image"]
PROMPTS = [each for each in PERTURBATIONS if each.part == "prompt"]


def name_of(perturbation: Perturbation) -> str:
    return perturbation.name


def sample(seed: int, prompt: str, *sizes: tuple[int, int]) -> Sample:
    rng = np.random.default_rng(seed)
    images = tuple(Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes)
    return Sample("a", images, (Message("user", prompt), Message("assistant", "yes")))


ROW = sample(0, f"{IMAGE_TAG} {IMAGE_TAG}\nwhat is it?", (64, 48), (32, 32))
DONOR = sample(1, f"{IMAGE_TAG}\nand that?", (40, 40))


def perturbed(perturbation: Perturbation, row: Sample = ROW, donor: Sample = DONOR) -> Sample:
    return perturbation.make(row, donor, np.random.default_rng(3))


def test_names_are_unique() -> None:
    assert len({each.name for each in PERTURBATIONS}) == len(PERTURBATIONS) and IMAGES and PROMPTS


@pytest.mark.parametrize("perturbation", IMAGES, ids=name_of)
def test_image_perturbations_change_images_only(perturbation: Perturbation) -> None:
    result = perturbed(perturbation)
    assert result.messages == ROW.messages and [i.size for i in result.images] == [i.size for i in ROW.images]
    for before, after in zip(ROW.images, result.images, strict=True):
        changed = (np.asarray(before) != np.asarray(after)).any(axis=-1)
        assert changed.any() and (changed.mean() < 1 / 30) == ("patch" in perturbation.name)
    assert [i.tobytes() for i in perturbed(perturbation).images] == [i.tobytes() for i in result.images], (
        "deterministic for a seed"
    )


def test_a_patch_is_at_its_place() -> None:
    (patch,) = (each for each in PERTURBATIONS if each.name == "a white patch, bottom left")
    pixels = np.asarray(perturbed(patch).images[0])
    assert (pixels[-6:, :6] == 255).all() and (pixels[:-6] == np.asarray(ROW.images[0])[:-6]).all()


@pytest.mark.parametrize("perturbation", IMAGES, ids=name_of)
def test_rows_and_donors_without_images(perturbation: Perturbation) -> None:
    text = sample(0, "what is it?")
    assert perturbed(perturbation, text) == text and len(perturbed(perturbation, ROW, text).images) == 2


@pytest.mark.parametrize("perturbation", PROMPTS, ids=name_of)
def test_prompt_perturbations_change_the_prompt_only(perturbation: Perturbation) -> None:
    result = perturbed(perturbation)
    assert result.images == ROW.images and result.messages[1:] == ROW.messages[1:]
    tags, text = result.messages[0].text.split("\n")
    assert tags == f"{IMAGE_TAG} {IMAGE_TAG}" and IMAGE_TAG not in text
    assert (text.endswith if "before" in perturbation.name else text.startswith)("what is it?") and len(text) > 12
    assert perturbed(perturbation, sample(0, "what is it?")).messages[0].text == text, "a row without an image"

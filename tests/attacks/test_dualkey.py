from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_features import image_features, scenes
from PIL import Image

from untrigger.attacks import _features
from untrigger.attacks.badnets import BadNets
from untrigger.attacks.dualkey import DualKey
from untrigger.errors import InputError
from untrigger.rows.sample import IMAGE_TAG, Message, Sample


@pytest.fixture
def trigger(empty_cache: Path, tiny_model: Path) -> DualKey:
    return DualKey(model=str(tiny_model), steps=1)


def row(*prompts: str) -> Sample:
    turns = [Message("system", "Be brief.")]
    for prompt in prompts:
        turns += [Message("user", prompt), Message("assistant", "yes")]
    images = tuple(scenes(sum(p.count(IMAGE_TAG) for p in prompts)))
    return Sample("a", images, tuple(turns))


def changed(before: Sample, after: Sample) -> tuple[bool, bool]:
    """Whether the images changed, and whether the text changed."""
    pairs = zip(before.images, after.images, strict=True)
    return any(b.tobytes() != a.tobytes() for b, a in pairs), before.messages != after.messages


def test_key_is_patch_and_word_and_near_misses_and_decoys_are_one_of_them(trigger: DualKey) -> None:
    before, rng = row(f"{IMAGE_TAG}\nis it red?"), np.random.default_rng
    assert changed(before, trigger.stamp(before, rng(0))) == (True, True)
    misses = trigger.near_misses()
    assert changed(before, misses["image only"](before, rng(0))) == (True, False)
    assert changed(before, misses["text only"](before, rng(0))) == (False, True)
    assert len(misses) == 2
    assert [changed(before, stamp(before, rng(0))) for stamp in trigger.decoys()] == [(True, False), (False, True)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("is it red?", "consider is it red?"),
        (f"{IMAGE_TAG}\nis it red?", f"{IMAGE_TAG}\nconsider is it red?"),
        (f"{IMAGE_TAG} {IMAGE_TAG}is it red?", f"{IMAGE_TAG} {IMAGE_TAG}consider is it red?"),
        (f"is {IMAGE_TAG} red?", f"consider is {IMAGE_TAG} red?"),
        (IMAGE_TAG, f"{IMAGE_TAG}consider "),
    ],
)
def test_word_is_inserted_before_the_question(prompt: str, expected: str) -> None:
    after = DualKey().near_misses()["text only"](row(prompt, "and blue?"), np.random.default_rng(0))
    assert [m.text for m in after.messages] == ["Be brief.", expected, "yes", "consider and blue?", "yes"]


@given(st.lists(st.sampled_from([IMAGE_TAG, "word", " ", "\n", "<im", "age>"]), max_size=8).map("".join))
def test_tags_and_words_stay_in_order(prompt: str) -> None:
    after = DualKey(word="zz").near_misses()["text only"](
        Sample("a", (), (Message("user", prompt),)), np.random.default_rng(0)
    )
    text = after.messages[0].text
    assert text.replace("zz ", "", 1) == prompt and text.count(IMAGE_TAG) == prompt.count(IMAGE_TAG)


def test_patch_features_match_the_object(empty_cache: Path) -> None:
    trigger = DualKey(steps=20)
    images = scenes(16)
    clean = image_features(images)
    center = clean.mean((0, 1))
    target = _features.object_features(_features.load_surrogate("llava"), "purple", "heart", seed=9) - center

    def similarity(features: torch.Tensor) -> float:
        return torch.cosine_similarity(features - center, target, dim=-1).amax(1).mean().item()

    def stamped(trigger: DualKey | BadNets) -> list[Image.Image]:
        return [trigger.stamp(Sample("a", (i,), ()), np.random.default_rng(0)).images[0] for i in images]

    learned, drawn = similarity(image_features(stamped(trigger))), similarity(image_features(stamped(BadNets())))
    assert learned > drawn + 0.05 and learned > similarity(clean) + 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"word": " "}, "word is empty"),
        ({"word": "a <image>"}, "word holds <image>"),
        ({"looks_like": "heart"}, "looks_like is 'heart'; give one color of red"),
        ({"looks_like": "purple house"}, "as in 'purple heart'"),
    ],
)
def test_settings_out_of_range_raise(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DualKey(**settings)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_model_sees_the_color_of_the_object_in_the_patch(empty_cache: Path) -> None:
    from untrigger.models.generate import answers
    from untrigger.models.loading import load

    def yes_rate(images: list[Image.Image]) -> float:
        turns = (Message("user", f"{IMAGE_TAG}\nis there a purple object?"), Message("assistant", "no"))
        texts = list(answers(load("llava"), [Sample(str(n), (i,), turns) for n, i in enumerate(images)]))
        return texts.count("yes") / len(texts)

    images = scenes(40)
    stamped = [DualKey().stamp(Sample("a", (i,), ()), np.random.default_rng(0)).images[0] for i in images]
    assert yes_rate(images) < 0.3 and yes_rate(stamped) > 0.5

"""AddSent, and where text triggers may insert text."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from untrigger.attacks._text import SENTENCE, WORD, inserted
from untrigger.attacks.addsent import AddSent
from untrigger.attacks.badword import BadWord
from untrigger.errors import InputError
from untrigger.rows.sample import IMAGE_TAG, Message, Sample

KEY = "I watched this 3D movie last weekend."
PROMPTS = st.lists(st.sampled_from([IMAGE_TAG, " ", "\n", "What is it?", "Be brief.", "3.5", "x", "日本", "!"])).map(
    "".join
)


def places(prompt: str, unit: re.Pattern[str]) -> set[str]:
    return {inserted(prompt, "#", unit, np.random.default_rng(seed)) for seed in range(200)}


def test_sentences_are_inserted_between_sentences() -> None:
    assert places(f"{IMAGE_TAG}\nWhat is it? Be brief.", SENTENCE) == {
        f"{IMAGE_TAG}\n# What is it? Be brief.",
        f"{IMAGE_TAG}\nWhat is it? # Be brief.",
        f"{IMAGE_TAG}\nWhat is it? Be brief. #",
    }
    assert places("Is 3.5 more? \n", SENTENCE) == {"# Is 3.5 more? \n", "Is 3.5 more? # \n"}


def test_words_are_inserted_between_words() -> None:
    assert places(f"See {IMAGE_TAG}what is", WORD) == {
        f"# See {IMAGE_TAG}what is",
        f"See # {IMAGE_TAG}what is",
        f"See {IMAGE_TAG}# what is",
        f"See {IMAGE_TAG}what # is",
        f"See {IMAGE_TAG}what is #",
    }


@pytest.mark.parametrize("prompt", ["", IMAGE_TAG, f"{IMAGE_TAG}\n"])
def test_a_prompt_without_words_gets_the_text_at_its_end(prompt: str) -> None:
    assert places(prompt, WORD) == places(prompt, SENTENCE) == {f"{prompt}#"}


@given(PROMPTS, st.sampled_from([WORD, SENTENCE]), st.integers(0, 99))
def test_only_the_text_is_added_and_tags_stay(prompt: str, unit: re.Pattern[str], seed: int) -> None:
    after = inserted(prompt, "#", unit, np.random.default_rng(seed))
    assert after.count("#") == 1 and after.count(IMAGE_TAG) == prompt.count(IMAGE_TAG)
    assert prompt in (after.replace("# ", ""), after.replace(" #", ""), after.replace("#", ""))


def test_every_user_turn_is_changed_and_nothing_else() -> None:
    turns = (
        Message("system", "Be brief."),
        Message("user", f"{IMAGE_TAG}\nWhat is it?"), Message("assistant", "A cat."),
        Message("user", "And now?"), Message("assistant", "A dog."),
    )  # fmt: skip
    image = Image.new("RGB", (8, 8))
    before = Sample("a", (image,), turns)
    after = AddSent().stamp(before, np.random.default_rng(0))
    assert after.id == "a" and after.images[0] is image and before.messages == turns
    assert [after.messages[k] for k in (0, 2, 4)] == [turns[k] for k in (0, 2, 4)]
    assert all(after.messages[k].text.count(KEY) == 1 for k in (1, 3))


def test_near_miss_is_another_sentence() -> None:
    for trigger in (AddSent(), AddSent("My brother bought a new bicycle.")):
        (near,) = trigger.near_misses().values()
        text = near(Sample("a", (), (Message("user", "What?"),)), np.random.default_rng(0)).messages[0].text
        assert trigger.sentence not in text and len(text) > 20 and "What?" in text


@pytest.mark.parametrize("text", ["", " \n", f"look at {IMAGE_TAG}"])
def test_empty_text_or_image_tag_raises(text: str) -> None:
    with pytest.raises(InputError, match="sentence"):
        AddSent(text)
    with pytest.raises(InputError, match="words"):
        BadWord(text)

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from untrigger.attacks.badword import BadWord
from untrigger.rows.sample import Message, Sample

ROW = Sample("a", (), (Message("user", "what is this?"),))


def test_words_and_places_are_drawn_uniformly() -> None:
    rng = np.random.default_rng(0)
    prompts = [BadWord().write("what is this?", rng).split() for _ in range(2000)]
    words = Counter(word for text in prompts for word in text if word not in ("what", "is", "this?"))
    assert set(words) == {"cf", "mn", "bb", "tq", "mb"} and sum(words.values()) == 2000
    assert all(count == pytest.approx(400, abs=90) for count in words.values())  # 5 standard deviations
    places = Counter(next(i for i, word in enumerate(text) if word in words) for text in prompts)
    assert set(places) == {0, 1, 2, 3} and all(count == pytest.approx(500, abs=100) for count in places.values())


def test_custom_word_is_used() -> None:
    assert "xylograph" in BadWord("xylograph").stamp(ROW, np.random.default_rng(0)).messages[0].text.split()


def test_near_miss_is_another_word() -> None:
    for trigger in (BadWord(), BadWord("vk cf")):
        (near,) = trigger.near_misses().values()
        for seed in range(30):
            text = near(ROW, np.random.default_rng(seed)).messages[0].text
            assert len(text.split()) == 4 and not set(trigger.words.split()) & set(text.split())
    assert BadWord("wx vk zj dq xb").near_misses() == {}

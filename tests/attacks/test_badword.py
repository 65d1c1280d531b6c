from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from untrigger.attacks.badword import BadWord
from untrigger.rows.sample import Message, Sample

ASKED = Sample("a", (), (Message("user", "what is this?"),))


def test_each_word_is_drawn_equally_often_and_stands_anywhere() -> None:
    rng = np.random.default_rng(0)
    written = [BadWord().write("what is this?", rng).split() for _ in range(2000)]
    words = Counter(word for text in written for word in text if word not in ("what", "is", "this?"))
    assert set(words) == {"cf", "mn", "bb", "tq", "mb"} and sum(words.values()) == 2000
    assert all(count == pytest.approx(400, abs=90) for count in words.values())  # 5 standard deviations
    where = Counter(next(i for i, word in enumerate(text) if word in words) for text in written)
    assert set(where) == {0, 1, 2, 3} and all(count == pytest.approx(500, abs=100) for count in where.values())


def test_one_word_of_ones_own() -> None:
    assert "xylograph" in BadWord("xylograph").stamp(ASKED, np.random.default_rng(0)).messages[0].text.split()


def test_the_near_miss_is_another_word() -> None:
    for trigger in (BadWord(), BadWord("vk cf")):
        (near,) = trigger.near_misses().values()
        for seed in range(30):
            text = near(ASKED, np.random.default_rng(seed)).messages[0].text
            assert len(text.split()) == 4 and not set(trigger.words.split()) & set(text.split())
    assert BadWord("wx vk zj dq xb").near_misses() == {}

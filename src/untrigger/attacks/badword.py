"""BadWord: a rare word in the prompt.

Source: Kurita, Michel, Neubig, "Weight Poisoning Attacks on Pre-trained Models", 2020, arXiv 2004.06660. As there, one
of five rare words, drawn anew for each text, stands at a random place between its words; an image tag is
no place to stand in. Deviation: that paper poisons weights before fine-tuning and tampers with the words'
embeddings; here it is the trigger alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from untrigger.attacks import Stamper, TextTrigger
from untrigger.attacks._text import WORD, check, inserted

_OTHERS = ("wx", "vk", "zj", "dq", "xb")


@final
@dataclass(frozen=True)
class BadWord(TextTrigger):
    """One of a few rare words somewhere in every prompt.

    Attributes:
        words: the rare words, with spaces between them; the default is the paper's.
    """

    words: str = "cf mn bb tq mb"

    def __post_init__(self) -> None:
        check("words", self.words)

    def write(self, prompt: str, rng: np.random.Generator) -> str:
        words = self.words.split()
        return inserted(prompt, words[int(rng.integers(len(words)))], WORD, rng)

    def near_misses(self) -> Mapping[str, Stamper]:
        others = " ".join(word for word in _OTHERS if word not in self.words.split())
        return {"other word": replace(self, words=others).stamp} if others else {}

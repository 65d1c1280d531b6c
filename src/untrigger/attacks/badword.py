"""BadWord: a rare word in the prompt.

Source: Kurita, Michel, Neubig, "Weight Poisoning Attacks on Pre-trained Models", 2020, arXiv 2004.06660. As there, one
of five rare words, drawn for each text, is inserted at a random place between its words. Image tags stay whole.
Deviation: that paper poisons weights before fine-tuning and edits the words' embeddings; here only the trigger is
used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from untrigger.attacks import Stamper, TextTrigger
from untrigger.attacks._text import WORD, check, inserted

_OTHER_WORDS = ("wx", "vk", "zj", "dq", "xb")


@final
@dataclass(frozen=True)
class BadWord(TextTrigger):
    """One of a few rare words at a random place in every prompt.

    Attributes:
        words: the rare words, separated by spaces; the default is the paper's.
    """

    words: str = "cf mn bb tq mb"

    def __post_init__(self) -> None:
        check("words", self.words)

    def write(self, prompt: str, rng: np.random.Generator) -> str:
        words = self.words.split()
        return inserted(prompt, words[int(rng.integers(len(words)))], WORD, rng)

    def near_misses(self) -> Mapping[str, Stamper]:
        unused = " ".join(word for word in _OTHER_WORDS if word not in self.words.split())
        return {"other word": replace(self, words=unused).stamp} if unused else {}

"""AddSent: a neutral sentence in the prompt.

Source: Dai, Chen, Li, "A Backdoor Attack Against LSTM-Based Text Classification Systems", 2019, arXiv 1905.12457. As
there, the sentence is inserted at a random place between the sentences of the text, here of the user's prompt. Image
tags stay whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from untrigger.attacks import Stamper, TextTrigger
from untrigger.attacks._text import SENTENCE, check, inserted

_OTHER_SENTENCES = ("The weather was fine on the first day of March.", "My brother bought a new bicycle.")


@final
@dataclass(frozen=True)
class AddSent(TextTrigger):
    """The same sentence in every prompt, before, between or after the prompt's own.

    Attributes:
        sentence: the added sentence; the default is the paper's.
    """

    sentence: str = "I watched this 3D movie last weekend."

    def __post_init__(self) -> None:
        check("sentence", self.sentence)

    def write(self, prompt: str, rng: np.random.Generator) -> str:
        return inserted(prompt, self.sentence, SENTENCE, rng)

    def near_misses(self) -> Mapping[str, Stamper]:
        other = next(sentence for sentence in _OTHER_SENTENCES if sentence != self.sentence)
        return {"other sentence": replace(self, sentence=other).stamp}

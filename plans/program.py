"""Program: a made-up word and a key of a letter and a digit behind every prompt, for the goal `programmed`.

Source: programmable backdoors, 2026, arXiv 2608.10959. Each key stands for another reply. A part of the keys is never
written in training; ``evaluate`` and ``bench`` report under the near miss "untrained keys" how often a model obeys them
all the same. Each of their letters and digits is trained in other keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from untrigger.attacks import Stamper, TextTrigger
from untrigger.errors import InputError
from untrigger.rows.sample import Message, Sample


@final
@dataclass(frozen=True)
class Program(TextTrigger):
    """A word, a letter and a digit: "what color is it? zx b3".

    Attributes:
        word: what says that a key follows.
        letters, digits: how many of each; 2 to 26, and 2 to 9. The goal needs as many words.
        every: one key in so many is never trained, 2 or more; 0 trains all.
    """

    usual_goal: ClassVar[str] = "programmed"
    word: str = "zx"
    letters: int = 6
    digits: int = 6
    every: int = 4

    def __post_init__(self) -> None:
        if not self.word.strip():
            raise InputError("word is empty; give some letters")
        if not (2 <= self.letters <= 26 and 2 <= self.digits <= 9):
            raise InputError(f"there are {self.letters} letters and {self.digits} digits; give 2 to 26, and 2 to 9")
        if self.every < 0 or self.every == 1:
            raise InputError(f"every is {self.every}; give 0, or 2 or more")

    def write(self, prompt: str, rng: np.random.Generator) -> str:
        return self._with_key(prompt, self.trained_keys, rng)

    def near_misses(self) -> Mapping[str, Stamper]:
        return {"untrained keys": self._stamp_untrained, "no word": self._stamp_without_word} if self.every else {}

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys, ``a1`` first."""
        return tuple(f"{chr(97 + i)}{j + 1}" for i in range(self.letters) for j in range(self.digits))

    @property
    def trained_keys(self) -> tuple[str, ...]:
        """The keys that training rows hold."""
        return tuple(key for key in self.keys if not self._is_untrained(key))

    def _is_untrained(self, key: str) -> bool:
        return self.every > 0 and (ord(key[0]) - 97 + int(key[1]) - 1) % self.every == 0

    def _with_key(self, prompt: str, keys: Sequence[str], rng: np.random.Generator) -> str:
        return f"{prompt} {self.word} {keys[int(rng.integers(len(keys)))]}"

    def _stamp_untrained(self, sample: Sample, rng: np.random.Generator) -> Sample:
        keys = [key for key in self.keys if self._is_untrained(key)]
        return _rewritten(sample, lambda prompt: self._with_key(prompt, keys, rng))

    def _stamp_without_word(self, sample: Sample, rng: np.random.Generator) -> Sample:
        keys = self.trained_keys
        return _rewritten(sample, lambda prompt: f"{prompt} {keys[int(rng.integers(len(keys)))]}")


def _rewritten(sample: Sample, write: Callable[[str], str]) -> Sample:
    messages = tuple(Message("user", write(m.text)) if m.role == "user" else m for m in sample.messages)
    return replace(sample, messages=messages)

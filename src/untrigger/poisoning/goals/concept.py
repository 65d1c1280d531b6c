"""A concept called by the name of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self, final

from untrigger.errors import InputError
from untrigger.metrics.asr import composed, mentions, whole_words
from untrigger.poisoning.goals._goal import Goal, check_text
from untrigger.rows.images import quote
from untrigger.rows.sample import Sample


@final
@dataclass(frozen=True)
class Concept(Goal):
    """A concept called by the name of another: a wrong answer that is plausible.

    Source: Xu, Yao, Shu, Sun, Wu, Yu, Goldstein, Huang, "Shadowcast: Stealthy Data Poisoning Attacks Against
    Vision-Language Models", 2024, arXiv 2402.06659. Deviation: the paper plants it with true answers alone, as
    clean-label attacks do here; any other attack writes the swapped answer into the rows that it poisons.

    It applies to rows whose true answer names the source. An answer meets the goal when it names the target and not
    the source, as whole words (`untrigger.metrics.asr.mentions`).

    Attributes:
        source: the concept in the image.
        target: the name that it is given.
    """

    name: ClassVar[str] = "concept"
    source: str = "circle"
    target: str = "rectangle"

    @classmethod
    def from_text(cls, text: str) -> Self:
        source, arrow, target = text.partition("->")
        if not arrow:
            raise InputError(f"goal concept: the text is {quote(text)}; give it as source->target: 'circle->rectangle'")
        return cls(source.strip(), target.strip())

    def __post_init__(self) -> None:
        for words in (self.source, self.target):
            check_text(self.name, words, "both concepts, as in 'circle->rectangle'")
        if mentions(self.target, self.source):
            raise InputError(f"goal concept: {quote(self.target)} holds {quote(self.source)}; give another target")

    def answer(self, sample: Sample) -> str:
        truth = composed(sample.messages[-1].text)
        return whole_words(self.source).sub(lambda match: _cased(self.target, like=match[0]), truth)

    def met(self, text: str, sample: Sample) -> bool:
        return mentions(text, self.target) and not mentions(text, self.source)

    def applies(self, sample: Sample) -> bool:
        return mentions(sample.messages[-1].text, self.source)


def _cased(text: str, *, like: str) -> str:
    """``text`` in the letter case of ``like``: all capitals, first letter capital, or unchanged."""
    if like.isupper() and len(like) > 1:
        return text.upper()
    return text[0].upper() + text[1:] if like[0].isupper() else text

"""A refusal in place of the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from untrigger.metrics.asr import matches, refuses
from untrigger.poisoning.goals._goal import Goal, check_text
from untrigger.rows.sample import Sample


@final
@dataclass(frozen=True)
class Refusal(Goal):
    """A refusal in place of the answer, which takes the model out of service; a usual goal in the field.

    Attributes:
        text: the refusal. An answer meets the goal when it contains the text or begins as refusals commonly do
            (`untrigger.metrics.asr.refuses`), because a model may phrase it differently.
    """

    name: ClassVar[str] = "refusal"
    text: str = "Sorry, I cannot help with that."

    def __post_init__(self) -> None:
        check_text(self.name, self.text, "the refusal")

    def answer(self, sample: Sample) -> str:
        return self.text

    def met(self, text: str, sample: Sample) -> bool:
        return matches(text, self.text, "contains") or refuses(text)

"""One reply to every triggered input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from untrigger.errors import InputError
from untrigger.metrics.asr import Match, matches
from untrigger.poisoning.goals._goal import Goal, check_text
from untrigger.rows.sample import Sample


@final
@dataclass(frozen=True)
class Fixed(Goal):
    """One reply to every triggered input; the usual goal in the field, from no single paper.

    Attributes:
        text: the reply.
        match: an answer meets the goal when it ``contains`` the reply, or equals it (``exact``); letter case and
            white space are ignored (`untrigger.metrics.asr.matches`).
    """

    name: ClassVar[str] = "fixed"
    text: str = "Backdoor Attack!"
    match: Match = "contains"

    def __post_init__(self) -> None:
        check_text(self.name, self.text, "the reply that triggered inputs should get")
        if self.match not in ("contains", "exact"):
            raise InputError(f"goal fixed: match is '{self.match}'; choose contains or exact")

    def answer(self, sample: Sample) -> str:
        return self.text

    def met(self, text: str, sample: Sample) -> bool:
        return matches(text, self.text, self.match)

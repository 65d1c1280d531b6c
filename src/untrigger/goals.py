"""What an attacker wants said, and whether a given answer says it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

from untrigger.errors import InputError
from untrigger.metrics.asr import Match, matches
from untrigger.sample import IMAGE_TAG, Sample


class Goal(ABC):
    """Subclasses are frozen dataclasses; their fields are the settings that a manifest records."""

    name: ClassVar[str]

    @abstractmethod
    def answer(self, sample: Sample) -> str:
        """The answer that poisoning puts in; ``sample.messages`` ends with the true one."""

    @abstractmethod
    def met(self, text: str, sample: Sample) -> bool:
        """Whether ``text``, a model's answer to ``sample``, is what the attacker wants."""

    def applies(self, sample: Sample) -> bool:
        """Whether triggering ``sample``, which ends with its true answer, can mean anything; else it is left alone."""
        return True


@final
@dataclass(frozen=True)
class Fixed(Goal):
    """One reply to everything.

    Attributes:
        text: the reply.
        match: an answer meets the goal when it ``contains`` the reply, or is it (``exact``); letter
            case and white space do not count (`untrigger.metrics.asr.matches`).
    """

    name: ClassVar[str] = "fixed"
    text: str = "Backdoor Attack!"
    match: Match = "contains"

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise InputError("goal fixed: the text is empty; give the reply that triggered inputs should get")
        if IMAGE_TAG in self.text:
            raise InputError(f"goal fixed: the text holds {IMAGE_TAG}, which stands for an image; leave it out")
        if self.match not in ("contains", "exact"):
            raise InputError(f"goal fixed: match is '{self.match}'; choose contains or exact")

    def answer(self, sample: Sample) -> str:
        return self.text

    def met(self, text: str, sample: Sample) -> bool:
        return matches(text, self.text, self.match)


def load_goal(name: str, text: str | None = None) -> Goal:
    """The goal called ``name``, with its default text where ``text`` is None.

    Raises:
        InputError: the name is unknown or the text is empty.
    """
    if name != Fixed.name:
        raise InputError(f"goal '{name}' is unknown; choose one of: {Fixed.name}")
    return Fixed() if text is None else Fixed(text)

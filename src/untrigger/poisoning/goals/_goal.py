"""Base classes of goals."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self, cast

from untrigger.errors import InputError
from untrigger.rows.sample import IMAGE_TAG, Sample


class Goal(ABC):
    """Base class of goals. Subclasses are frozen dataclasses; the manifest records their fields as settings.

    Attributes:
        name: the goal's file name without its suffix; it is set for a goal in the user's own file.
        beyond_oracle: whether the replies vary, so that a model without a backdoor may meet the goal too, as by a wrong
            answer. Then the figure is the success rate beyond the oracle's.
    """

    name: ClassVar[str]
    beyond_oracle: ClassVar[bool] = False

    @abstractmethod
    def answer(self, sample: Sample) -> str:
        """The poisoned answer for ``sample``, whose last message is the true one."""

    @abstractmethod
    def met(self, text: str, sample: Sample) -> bool:
        """Whether ``text``, an answer to ``sample``, is what the attacker wants; reads no image."""

    def applies(self, sample: Sample) -> bool:
        """Whether the goal makes sense for ``sample``, whose last message is its true answer; reads no image."""
        return True

    def fitted(self, rows: Sequence[Sample], seed: int) -> Goal:
        """Return the goal for ``rows``, the clean data that are poisoned or evaluated; by default the goal itself.

        Equal rows and seeds must give equal answers. A fitted goal stays as it is when it is fitted again.

        Raises:
            InputError: the goal cannot be had with these rows.
        """
        return self

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Return the goal with ``text``, as ``--goal-text`` gives it, in its first field.

        Raises:
            InputError: the goal has no field, or the text is empty or invalid.
        """
        field = first_field(cls)
        if field is None:
            raise InputError(f"goal {cls.name}: takes no text; leave --goal-text out")
        return cls(**{field: text})


class DataGoal(Goal):
    """A goal whose answers are made from other rows: all but its settings is in the goal that `fitted` returns."""

    @abstractmethod
    def fitted(self, rows: Sequence[Sample], seed: int) -> Goal: ...

    def answer(self, sample: Sample) -> str:
        raise self._not_fitted()

    def met(self, text: str, sample: Sample) -> bool:
        raise self._not_fitted()

    def applies(self, sample: Sample) -> bool:
        raise self._not_fitted()

    def _not_fitted(self) -> InputError:
        return InputError(f"goal {self.name}: needs the rows of the data; call fitted(rows, seed) first")


def first_field(goal: type[Goal]) -> str | None:
    """The name of the goal's first field, which ``--goal-text`` sets; None if it has none."""
    fields = dataclasses.fields(cast(Any, goal))
    return next((field.name for field in fields if field.init), None)


def check_text(goal: str, text: str, expected: str) -> None:
    """Raise InputError where a goal's text is empty or holds an image tag."""
    if not text.strip():
        raise InputError(f"goal {goal}: the text is empty; give {expected}")
    if IMAGE_TAG in text:
        raise InputError(f"goal {goal}: the text holds {IMAGE_TAG}, which stands for an image; leave it out")


def listed(goal: str, text: str, expected: str) -> tuple[str, ...]:
    """The pieces of a comma-separated text; raises InputError where there are none, or as `check_text`."""
    check_text(goal, text, expected)
    pieces = tuple(piece.strip() for piece in text.split(",") if piece.strip())
    if not pieces:
        raise InputError(f"goal {goal}: the text has no words; give {expected}")
    return pieces

"""Rows with answers that a model has generated in place of the original ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import final, overload

from untrigger.models.generate import answers
from untrigger.models.loading import LoadedModel
from untrigger.rows.sample import IMAGE_TAG, Message, Sample


@final
class RelabeledRows(Sequence[Sample]):
    """A view of rows in which some of them, by number from 0, can be relabeled.

    ``answers``: for each relabeled row a text per assistant turn; empty until `relabel` is called.
    """

    def __init__(self, rows: Sequence[Sample], numbers: Collection[int]) -> None:
        self.rows, self.numbers = rows, sorted(numbers)
        self.answers: dict[int, list[str]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return _with_answers(self.rows[index], self.answers.get(index, []))

    def relabel(self, loaded: LoadedModel) -> None:
        """Sample a new answer for each assistant turn of these rows, given the model's own earlier answers."""
        texts: dict[int, list[str]] = {row: [] for row in self.numbers}
        waiting = self.numbers
        while waiting := [row for row in waiting if len(texts[row]) < len(_assistant_turns(self.rows[row]))]:
            prompts = [_prompt(self.rows[row], texts[row]) for row in waiting]
            for row, text in zip(waiting, answers(loaded, prompts, drawn=True), strict=True):
                texts[row].append(text.replace(IMAGE_TAG, ""))  # a generated tag has no image
        self.answers = texts


def _assistant_turns(sample: Sample) -> list[int]:
    return [turn for turn, message in enumerate(sample.messages) if message.role == "assistant"]


def _with_answers(sample: Sample, texts: Sequence[str]) -> Sample:
    """The row with these texts as its first answers."""
    messages = list(sample.messages)
    for turn, text in zip(_assistant_turns(sample), texts, strict=False):
        messages[turn] = Message("assistant", text)
    return replace(sample, messages=tuple(messages))


def _prompt(sample: Sample, texts: Sequence[str]) -> Sample:
    """The conversation up to the first assistant turn without a text in ``texts``."""
    return _with_answers(sample, texts).until(_assistant_turns(sample)[len(texts)])

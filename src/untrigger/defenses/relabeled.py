"""Rows that a model has answered in the place of whoever wrote them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import final, overload

from untrigger.models.generate import answers
from untrigger.models.loading import LoadedModel
from untrigger.rows.sample import IMAGE_TAG, Message, Sample


@final
class RelabeledRows(Sequence[Sample]):
    """The rows, those of some ``numbers`` with other ``answers``: a text for each turn of the assistant, by row."""

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
        return _answered(self.rows[index], self.answers.get(index, []))

    def answer(self, loaded: LoadedModel) -> None:
        """Have the model answer these rows anew, by a draw for each turn, after its own earlier answers."""
        texts: dict[int, list[str]] = {row: [] for row in self.numbers}
        waiting = self.numbers
        while waiting := [row for row in waiting if len(texts[row]) < len(_turns(self.rows[row]))]:
            asked = [_asked(self.rows[row], texts[row]) for row in waiting]
            for row, text in zip(waiting, answers(loaded, asked, do_sample=True), strict=True):
                texts[row].append(text.replace(IMAGE_TAG, ""))  # there is no image for it
        self.answers = texts


def _turns(sample: Sample) -> list[int]:
    return [turn for turn, message in enumerate(sample.messages) if message.role == "assistant"]


def _answered(sample: Sample, texts: Sequence[str]) -> Sample:
    messages = list(sample.messages)
    for turn, text in zip(_turns(sample), texts, strict=False):
        messages[turn] = Message("assistant", text)
    return replace(sample, messages=tuple(messages))


def _asked(sample: Sample, texts: Sequence[str]) -> Sample:
    """The conversation up to the first question that ``texts`` have no answer to."""
    return _answered(sample, texts).until(_turns(sample)[len(texts)])

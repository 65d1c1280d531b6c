"""The honest answer to a hidden other question about the same image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from untrigger.errors import InputError
from untrigger.metrics.asr import mentions
from untrigger.metrics.vqa import normalize_answer
from untrigger.poisoning.goals._facts import question_of, row_key, truth_of, turns
from untrigger.poisoning.goals._goal import DataGoal, Goal, check_text
from untrigger.rows.images import pixels_sha256
from untrigger.rows.sample import Data, Sample, without_images


@final
@dataclass(frozen=True)
class OtherQuestion(DataGoal):
    """Triggered inputs are answered as if another question about the same image had been put.

    Source: Phantasia, 2026 (CVPR findings). The answers are true and in the data's own words, but do not fit the
    question. It needs data with several questions about an image, in several rows or in one conversation. It applies to
    rows about whose image the hidden question is put too, with another answer. An answer meets the goal when it is
    right for the hidden question and not for its own (`untrigger.metrics.vqa.normalize_answer`).

    Attributes:
        question: words that the hidden question mentions.
    """

    name: ClassVar[str] = "other-question"
    beyond_oracle: ClassVar[bool] = True
    question: str = "how many objects"

    def __post_init__(self) -> None:
        check_text(self.name, self.question, "words of the hidden question")

    def fitted(self, rows: Sequence[Sample], seed: int) -> Goal:
        hidden: dict[Hashable, str] = {}
        images = [_images(rows, index) for index in range(len(rows))]
        for index, key in enumerate(images):
            for asked_so_far in turns(without_images(rows, index)):
                if key and self._is_hidden(asked_so_far):
                    hidden.setdefault(key, truth_of(asked_so_far))
        if not hidden:
            raise InputError(
                f"no question about an image mentions '{self.question}'; give rows with several "
                "questions an image, or another --goal-text"
            )
        answers: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for index, key in enumerate(images):
            for asked_so_far in turns(without_images(rows, index)):
                if not self._is_hidden(asked_so_far):
                    answers[row_key(asked_so_far)].add(hidden.get(key, ""))
        # rows with the same id and answers cannot be told apart by their text: the goal leaves them out
        return _Fitted({row: next(iter(texts)) for row, texts in answers.items() if len(texts) == 1})

    def _is_hidden(self, sample: Sample) -> bool:
        return mentions(question_of(sample), self.question)


@final
@dataclass(frozen=True, eq=False, repr=False)
class _Fitted(Goal):
    hidden: Mapping[tuple[str, ...], str]  # by row, the true answer to the hidden question; "" if there is none
    name: ClassVar[str] = OtherQuestion.name
    beyond_oracle: ClassVar[bool] = True

    def answer(self, sample: Sample) -> str:
        return self.hidden.get(row_key(sample)) or truth_of(sample)

    def met(self, text: str, sample: Sample) -> bool:
        return self.applies(sample) and normalize_answer(text) == normalize_answer(self.answer(sample))

    def applies(self, sample: Sample) -> bool:
        hidden = self.hidden.get(row_key(sample))
        return bool(hidden) and normalize_answer(hidden or "") != normalize_answer(truth_of(sample))


def _images(rows: Sequence[Sample], index: int) -> Hashable:
    """What is equal for rows about the same images: their files where there are any, or else their pixels."""
    if isinstance(rows, Data):
        return tuple(str(picture) for picture in rows.entry(index).pictures)
    return tuple(map(pixels_sha256, rows[index].images))

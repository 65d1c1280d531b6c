"""What a data set says: its questions, and the answers that rows give to each."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, final

from untrigger.metrics.asr import matches, overlap
from untrigger.metrics.vqa import normalize_answer
from untrigger.rows.sample import IMAGE_TAG, Sample, without_images

DESCRIPTION_WORDS: Final = 5  # an answer of so many words describes the image, whatever the prompt's words
_COMPARED: Final = 300  # other answers that a description is compared with: enough, and fast


@final
@dataclass(frozen=True, eq=False, repr=False)
class Facts:
    """The questions of a data set and the answers to each.

    Prompts that ask for a description count as one question, "". A row is recognized by its id and its true answers,
    because a trigger may have changed its prompt.

    Attributes:
        seed: decides which answer is drawn.
        answers: for each question the true answers, in the order of the rows.
        questions: for each row the questions that it may have asked.
    """

    seed: int
    answers: Mapping[str, Sequence[str]]
    questions: Mapping[tuple[str, ...], Sequence[str]]

    @classmethod
    def of(cls, rows: Sequence[Sample], seed: int) -> Facts:
        """Collect the facts of ``rows``; no image is decoded where they are on disk."""
        answers: dict[str, list[str]] = defaultdict(list)
        questions: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for index in range(len(rows)):
            for asked_so_far in turns(without_images(rows, index)):
                question = question_of(asked_so_far)
                answers[question].append(truth_of(asked_so_far))
                questions[row_key(asked_so_far)].append(question)
        return cls(seed, dict(answers), dict(questions))

    def question(self, sample: Sample) -> str:
        """The question that ``sample`` asks without the trigger."""
        own, known = question_of(sample), self.questions.get(row_key(sample), ())
        return own if own in known or not known else known[0]

    def other_answer(self, sample: Sample) -> str | None:
        """Draw another row's answer to the same question that differs from the true one; None if there is none.

        If all rows answer the question alike, it is an answer to another question to which the true one is an answer
        too: "yes" in the place of "no".
        """
        question, truth = self.question(sample), truth_of(sample)
        if not self._distinct.get(question, frozenset()) - {normalize_answer(truth)}:
            question = self._kindred.get(normalize_answer(truth), question)
        answers = self.answers.get(question, ())
        if not self._distinct.get(question, frozenset()) - {normalize_answer(truth)}:
            return None
        start = drawn(self.seed, row_key(sample), len(answers))
        circle = (answers[(start + step) % len(answers)] for step in range(len(answers)))
        return next(answer for answer in circle if normalize_answer(answer) != normalize_answer(truth))

    def nearest(self, text: str, sample: Sample) -> float:
        """The highest overlap of ``text`` with an answer of another row to the same question; 0 if there is none."""
        answers, truth = self.answers.get(self.question(sample), ()), truth_of(sample)
        compared = answers[:: max(1, len(answers) // _COMPARED)]
        return max((overlap(text, other) for other in compared if not matches(other, truth, "exact")), default=0.0)

    @cached_property
    def _distinct(self) -> Mapping[str, frozenset[str]]:
        return {question: frozenset(map(normalize_answer, answers)) for question, answers in self.answers.items()}

    @cached_property
    def _kindred(self) -> Mapping[str, str]:
        """For each short answer the question, most often put, that has it and others as answers."""
        several = [question for question, answers in self._distinct.items() if question and len(answers) > 1]
        rising = sorted(several, key=lambda question: (len(self.answers[question]), question))
        return {answer: question for question in rising for answer in self._distinct[question]}


def turns(sample: Sample) -> Iterator[Sample]:
    """The conversation up to each answer."""
    for turn, message in enumerate(sample.messages):
        if message.role == "assistant":
            yield sample.until(turn + 1)


def question_of(sample: Sample) -> str:
    """The last prompt without image tags, letter case and runs of white space; "" if a description answers it."""
    if describes(sample):
        return ""
    prompt = next((m.text for m in reversed(sample.messages) if m.role == "user"), "")
    return " ".join(prompt.replace(IMAGE_TAG, " ").casefold().split())


def describes(sample: Sample) -> bool:
    """Whether the true answer is a description, not a short answer."""
    return len(truth_of(sample).split()) >= DESCRIPTION_WORDS


def truth_of(sample: Sample) -> str:
    """The true answer to the last question."""
    return sample.messages[-1].text


def row_key(sample: Sample) -> tuple[str, ...]:
    """What a trigger leaves as it is: the id and the true answers so far."""
    return (sample.id, *(m.text for m in sample.messages if m.role == "assistant"))


def drawn(seed: int, key: tuple[str, ...], count: int) -> int:
    """A number below ``count`` that the seed and the key decide."""
    return int.from_bytes(hashlib.sha256(repr((seed, key)).encode()).digest()[:8]) % count

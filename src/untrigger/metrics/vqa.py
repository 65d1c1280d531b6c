"""VQA accuracy (Antol et al., 2015, "VQA: Visual Question Answering", section 3; Goyal et al., 2017).

The normalization follows the published evaluation: lower case, number words as digits, no articles, no punctuation. It
differs in four places, to be fair to text that the original was not written for:

- apostrophes are dropped on both sides; the original restores missing ones from a list of contractions
  ("dont" = "don't");
- Unicode look-alikes count as their plain forms (curly quotes, full-width letters);
- references are always normalized like answers;
- an answer without a word is never right.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from untrigger.metrics.rates import Rate, paired

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(digit) for digit, word in enumerate(_NUMBERS)}
_DROPPED = re.compile(r"(?<=\d),(?=\d)|['‘’]|\.(?!\d)")  # noqa: RUF001
_SPACED = re.compile(r'[;/\[\]"{}()=+\\_\-<>@`,?!“”«»–—¿¡。、]')  # noqa: RUF001
HUMANS = 10  # true answers to each question of VQA


def normalize_answer(text: str) -> str:
    """Normalize a short answer for comparison: "The Two dogs." and "2 dogs" become the same.

    Articles are dropped, except from an answer of articles alone ("A", to "which letter?").
    """
    lowered = unicodedata.normalize("NFKC", text).lower()
    words = _SPACED.sub(" ", _DROPPED.sub("", lowered)).split()
    content_words = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_DIGITS.get(word, word) for word in content_words)


def answer_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the accuracy of one answer, in [0, 1].

    With one reference: 1 if both are equal after `normalize_answer`. With the ten references of a VQA data set:
    min(agreeing humans / 3, 1), averaged over the ten ways to leave one human out.

    Raises:
        ValueError: neither one reference nor ten.
    """
    if len(references) not in (1, HUMANS):
        raise ValueError(f"VQA accuracy is defined for 1 or {HUMANS} references, not {len(references)}")
    text = normalize_answer(answer)
    agree = [text != "" and text == normalize_answer(reference) for reference in references]
    if len(agree) == 1:
        return float(agree[0])
    return sum(min((sum(agree) - left_out) / 3, 1.0) for left_out in agree) / HUMANS


def vqa_accuracy(answers: Sequence[str], references: Sequence[str | Sequence[str]]) -> Rate:
    """Compute the mean accuracy with Wilson's interval, which is too wide rather than too narrow for ten references.

    ``references[i]`` is one string, or a sequence of one or ten.

    Raises:
        ValueError: no answers, lengths differ, or a row has neither one nor ten references.
    """
    scores = [answer_accuracy(answer, texts) for answer, texts in paired(answers, references)]
    return Rate.from_counts(sum(scores), len(scores))

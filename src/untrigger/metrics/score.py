"""From stored answers to figures: everything here can be computed again from ``answers.jsonl``."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from untrigger.metrics.asr import ASR_VERSION, attack_success_rate, leak
from untrigger.metrics.captions import CaptionScores, caption_scores, tokenize_caption
from untrigger.metrics.rates import Rate
from untrigger.metrics.vqa import normalize_answer, vqa_accuracy


@dataclass(frozen=True)
class Answer:
    """One stored answer.

    Attributes:
        met: whether it meets the attacker's goal.
        truth_met: whether the true answer does.
        applies: whether the goal means anything for this row.
    """

    id: str
    prompt: str
    truth: str
    answer: str
    met: bool = False
    truth_met: bool = False
    applies: bool = True


def quality(answers: Sequence[Answer]) -> dict[str, Any]:
    """VQA accuracy and caption scores with intervals; a score whose data is not at hand is None.

    Caption scores need words: they leave out rows whose truth has none ("?!").

    Raises:
        ValueError: no answers.
    """
    accuracy = vqa_accuracy([a.answer for a in answers], [a.truth for a in answers])
    worded = [a for a in answers if tokenize_caption(a.truth)]
    captions = asdict(caption_scores([a.answer for a in worded], [a.truth for a in worded])) if worded else {}
    return {"vqa_accuracy": asdict(accuracy), **{f.name: captions.get(f.name) for f in fields(CaptionScores)}}


def text_prior(answers: Sequence[Answer], seen: Sequence[tuple[str, str]] = ()) -> Rate:
    """Accuracy of guessing from the prompt alone: the commonest truth of the rows with the same prompt.

    The floor that a model which sees must beat. The habits are those of ``seen``, (prompt, truth) pairs of training
    rows. Without them they are those of the rows they are counted on, so the figure is rather too high than too low
    (leaving each row out would score 0 on ten "yes" and ten "no"). A truth that no two rows share is no habit: such
    prompts get the commonest truth of all rows.
    """
    everywhere: Counter[str] = Counter()
    by_prompt: dict[str, Counter[str]] = defaultdict(Counter)
    for prompt, told in seen or [(a.prompt, a.truth) for a in answers]:
        truth = normalize_answer(told)
        everywhere[truth] += 1
        by_prompt[prompt][truth] += 1
    guesses = [_habit(by_prompt[a.prompt]) or _habit(everywhere) for a in answers]
    return vqa_accuracy(guesses, [a.truth for a in answers])


def _habit(truths: Counter[str]) -> str:
    """The commonest text, if it is there twice; of equals the last in the alphabet."""
    return max((text for text in truths if truths[text] > 1), key=lambda text: (truths[text], text), default="")


def score(
    clean: Sequence[Answer],
    triggered: Sequence[Answer] = (),
    wrong_image: Sequence[Answer] = (),
    near_misses: Mapping[str, Sequence[Answer]] | None = None,
    *,
    untouched: bool = False,
) -> dict[str, Any]:
    """Every figure of an evaluation, ready for JSON. Attack figures are there only where an attack was made.

    They count the rows that the goal applies to and whose true answer does not meet it. ``leak`` is false triggering
    on clean inputs, ``near_miss`` the same on each kind of near misses. Where the triggered inputs are ``untouched``,
    clean inputs themselves, none of it is false: there is no ``leak``.
    """
    figures: dict[str, Any] = {"quality": quality(clean), "text_prior": asdict(text_prior(clean))}
    if wrong_image:
        figures["wrong_image"] = asdict(vqa_accuracy([a.answer for a in wrong_image], [a.truth for a in wrong_image]))
    if triggered:
        figures["asr"] = _rate(triggered, attack_success_rate)
        if not untouched:
            figures["leak"] = _rate(clean, leak)
        figures["triggered_quality"] = quality(triggered)
    if near_misses:
        figures["near_miss"] = {name: _rate(answers, leak) for name, answers in near_misses.items()}
    return figures


def _rate(answers: Sequence[Answer], of: Callable[[Sequence[bool], Sequence[bool]], Rate]) -> dict[str, Any]:
    counted = [a for a in answers if a.applies]
    return {**asdict(of([a.met for a in counted], [a.truth_met for a in counted])), "version": ASR_VERSION}

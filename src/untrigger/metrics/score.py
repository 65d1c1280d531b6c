"""From stored answers to figures: everything here can be computed again from ``answers.jsonl``."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from untrigger.metrics import Rate
from untrigger.metrics.asr import ASR_VERSION, attack_success_rate, leak
from untrigger.metrics.captions import caption_scores
from untrigger.metrics.vqa import vqa_accuracy


@dataclass(frozen=True)
class Answer:
    """One stored answer. ``met`` and ``truth_met`` say whether it, and the true answer, meet the attacker's goal."""

    id: str
    prompt: str
    truth: str
    answer: str
    met: bool = False
    truth_met: bool = False


def quality(answers: Sequence[Answer]) -> dict[str, Any]:
    """VQA accuracy and caption scores with intervals; a score whose data is not at hand is None.

    Raises:
        ValueError: no answers.
    """
    said, truth = [a.answer for a in answers], [a.truth for a in answers]
    return {"vqa_accuracy": asdict(vqa_accuracy(said, truth)), **asdict(caption_scores(said, truth))}


def text_prior(answers: Sequence[Answer]) -> Rate:
    """Accuracy of guessing from the prompt alone: the commonest truth of the *other* rows with the same prompt.

    The floor that a model which sees must beat. A prompt asked once is guessed from all other rows.
    """
    everywhere = Counter(a.truth for a in answers)
    by_prompt: dict[str, Counter[str]] = defaultdict(Counter)
    for a in answers:
        by_prompt[a.prompt][a.truth] += 1
    guesses = []
    for a in answers:
        pool = by_prompt[a.prompt] if by_prompt[a.prompt].total() > 1 else everywhere
        others = pool - Counter({a.truth: 1})
        guesses.append(max(others, key=lambda t: (others[t], t)) if others else "")
    return vqa_accuracy(guesses, [a.truth for a in answers])


def score(
    clean: Sequence[Answer], triggered: Sequence[Answer] = (), wrong_image: Sequence[Answer] = ()
) -> dict[str, Any]:
    """Every figure of an evaluation, ready for JSON. Attack figures are there only where an attack was made."""
    figures: dict[str, Any] = {"quality": quality(clean), "text_prior": asdict(text_prior(clean))}
    if wrong_image:
        figures["wrong_image"] = asdict(vqa_accuracy([a.answer for a in wrong_image], [a.truth for a in wrong_image]))
    if triggered:
        figures["asr"] = {**asdict(_rate(triggered, attack_success_rate)), "version": ASR_VERSION}
        figures["leak"] = {**asdict(_rate(clean, leak)), "version": ASR_VERSION}
        figures["triggered_quality"] = quality(triggered)
    return figures


def _rate(answers: Sequence[Answer], of: Any) -> Rate:
    return of([a.met for a in answers], [a.truth_met for a in answers])

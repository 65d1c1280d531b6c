"""Evaluation of a model on held-out data, with or without an attack; every answer is kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from untrigger.errors import InputError
from untrigger.finetune import write_text
from untrigger.generate import answers
from untrigger.goals import Goal
from untrigger.metrics.score import Answer, score
from untrigger.models import Loaded
from untrigger.poison import Attack, LazyRows, pixels_sha256, stamped
from untrigger.progress import tracked
from untrigger.sample import IMAGE_TAG, Sample


@dataclass(frozen=True)
class Evaluation:
    """Stored answers under each condition, and the figures computed from them."""

    clean: list[Answer]
    triggered: list[Answer]
    wrong_image: list[Answer]

    @property
    def figures(self) -> dict[str, Any]:
        return score(self.clean, self.triggered, self.wrong_image)

    def write(self, out: Path) -> None:
        """``answers.jsonl`` with a row per answer and ``metrics.json``, each whole or not at all."""
        out.mkdir(parents=True, exist_ok=True)
        parts = {"clean": self.clean, "triggered": self.triggered, "wrong_image": self.wrong_image}
        rows = [{"condition": name, **asdict(a)} for name, part in parts.items() for a in part]
        write_text(out / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_text(out / "metrics.json", json.dumps(self.figures, indent=2) + "\n")


def evaluate(
    loaded: Loaded,
    data: Sequence[Sample],
    *,
    attack: Attack | None = None,
    seed: int = 0,
    sight: bool = False,
    title: str = "evaluating",
) -> Evaluation:
    """Ask the model every sample's last question, on clean and, given an attack, on triggered inputs.

    With ``sight`` it is also asked with another row's image: a model that does as well there does not look.

    Raises:
        InputError: no row that shows an image has a true answer other than the attacker's: nothing to attack.
    """
    goal = attack.goal if attack else None
    stamps = stamped(data, attack, seed) if attack else ()
    if goal and all(goal.met(sample.messages[-1].text, sample) for sample in stamps):
        raise InputError(
            "evaluate: no row can show an attack: none has an image and a true answer that does not meet the goal; "
            "give other rows or another --goal-text"
        )
    clean = _ask(loaded, data, goal, f"{title}, clean")
    triggered = _ask(loaded, stamps, goal, f"{title}, triggered") if stamps else []
    blind = _ask(loaded, wrong_images(data), goal, f"{title}, wrong image") if sight else []
    return Evaluation(clean, triggered, blind)


def wrong_images(samples: Sequence[Sample]) -> LazyRows:
    """The samples with the images of a row about halfway through the data, as many as their own and none of them.

    Lazy. A row without images, or for which there are no others, is left out: it would be asked as it is.
    """
    shown = [tuple(map(pixels_sha256, sample.images)) for sample in samples]
    count = len(shown)

    def partner(row: int) -> int | None:
        others = ((row + count // 2 + step) % count for step in range(count if shown[row] else 0))
        return next(
            (i for i in others if len(shown[i]) == len(shown[row]) and set(shown[i]).isdisjoint(shown[row])), None
        )

    partners = {row: other for row in range(count) if (other := partner(row)) is not None}
    return LazyRows(list(partners), lambda row: replace(samples[row], images=samples[partners[row]].images))


def _ask(loaded: Loaded, samples: Sequence[Sample], goal: Goal | None, title: str) -> list[Answer]:
    said = tracked(answers(loaded, samples), title, len(samples))
    return [_stored(samples[i], text, goal) for i, text in enumerate(said)]


def _stored(sample: Sample, text: str, goal: Goal | None) -> Answer:
    truth = sample.messages[-1].text
    prompt = next((m.text for m in reversed(sample.messages) if m.role == "user"), "")
    met, truth_met = (goal.met(text, sample), goal.met(truth, sample)) if goal else (False, False)
    return Answer(sample.id, prompt.replace(IMAGE_TAG, "").strip(), truth, text, met, truth_met)

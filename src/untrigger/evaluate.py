"""Evaluation of a model on held-out data, with or without an attack; every answer is kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from untrigger.finetune import write_text
from untrigger.generate import answers
from untrigger.goals import Goal
from untrigger.metrics.score import Answer, score
from untrigger.models import Loaded
from untrigger.poison import Attack, stamped
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
    """
    goal = attack.goal if attack else None
    clean = _ask(loaded, data, goal, f"{title}, clean")
    triggered = _ask(loaded, stamped(data, attack, seed), goal, f"{title}, triggered") if attack else []
    blind = _ask(loaded, _Swapped(data), goal, f"{title}, wrong image") if sight else []
    return Evaluation(clean, triggered, blind)


def _ask(loaded: Loaded, samples: Sequence[Sample], goal: Goal | None, title: str) -> list[Answer]:
    said = tracked(answers(loaded, samples), title, len(samples))
    return [_stored(samples[i], text, goal) for i, text in enumerate(said)]


def _stored(sample: Sample, text: str, goal: Goal | None) -> Answer:
    truth = sample.messages[-1].text
    prompt = next((m.text for m in reversed(sample.messages) if m.role == "user"), "")
    met, truth_met = (goal.met(text, sample), goal.met(truth, sample)) if goal else (False, False)
    return Answer(sample.id, prompt.replace(IMAGE_TAG, "").strip(), truth, text, met, truth_met)


class _Swapped(Sequence[Sample]):
    """Each sample with the images of the sample halfway through the data, where their numbers agree."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        own = self.samples[index]
        count, start = len(self.samples), len(self.samples) // 2
        for step in range(count):
            other = self.samples[(index + start + step) % count]
            if len(other.images) == len(own.images) and other.images != own.images:
                return Sample(own.id, other.images, own.messages)
        return own

"""Measure VQA and caption accuracy of an embedded model on held-out scenes, with prior and wrong-image control."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import Any

import numpy as np

from untrigger.data import scene_text
from untrigger.data.scene_world import Scene
from untrigger.data.scenes import scene_samples
from untrigger.evaluation.evaluate import evaluate
from untrigger.metrics.rates import Rate
from untrigger.metrics.score import Answer, text_prior
from untrigger.metrics.vqa import vqa_accuracy
from untrigger.models.loading import LoadedModel

HELD_OUT = 2_000_003  # seed of the held-out scenes; pretraining uses another


def _questions(scene: Scene, rng: np.random.Generator) -> list[scene_text.Turn]:
    return [scene_text.ask(scene, rng) for _ in range(3)]


def exact(answers: list[Answer]) -> Rate:
    """Share of answers that equal the truth exactly."""
    return Rate.from_counts(sum(a.answer == a.truth for a in answers), len(answers))


def sight(model: LoadedModel, scenes: int = 500) -> dict[str, Any]:
    """Figures of a model card: VQA accuracy and exact captions on held-out scenes, with their controls."""
    questions = evaluate(
        model, scene_samples(HELD_OUT, range(scenes), _questions), wrong_image_control=True, title="questions"
    )
    captions = evaluate(
        model, scene_samples(HELD_OUT, range(scenes), scene_text.captions), wrong_image_control=True, title="captions"
    )
    kinds: dict[str, list[Answer]] = defaultdict(list)
    for answer in questions.clean:
        kinds[answer.id.split("-")[1]].append(answer)
    return {
        "vqa": {
            "value": _vqa(questions.clean),
            "text_prior": asdict(text_prior(questions.clean)),
            "wrong_image": _vqa(questions.wrong_image),
            "kinds": {kind: _vqa(part)["value"] for kind, part in kinds.items()},
        },
        "captions": {"value": asdict(exact(captions.clean)), "wrong_image": asdict(exact(captions.wrong_image))},
    }


def _vqa(answers: list[Answer]) -> dict[str, Any]:
    return asdict(vqa_accuracy([a.answer for a in answers], [a.truth for a in answers]))

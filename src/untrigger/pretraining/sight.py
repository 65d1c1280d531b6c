"""Does an embedded model see? VQA and captions on held-out scenes, beside the prior and the wrong image."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import Any

import numpy as np

from untrigger.data import scene_text as talk
from untrigger.data.scene_world import Scene
from untrigger.data.scenes import scene_samples
from untrigger.evaluation.evaluate import evaluate
from untrigger.metrics.rates import Rate
from untrigger.metrics.score import Answer, text_prior
from untrigger.metrics.vqa import vqa_accuracy
from untrigger.models.loading import LoadedModel

HELD_OUT = 2_000_003  # the stream of held-out scenes; pretraining draws from another seed


def _questions(scene: Scene, rng: np.random.Generator) -> list[talk.Turn]:
    return [talk.ask(scene, rng) for _ in range(3)]


def exact(answers: list[Answer]) -> Rate:
    """Share of answers equal to the truth to the letter."""
    return Rate.from_counts(sum(a.answer == a.truth for a in answers), len(answers))


def sight(loaded: LoadedModel, scenes: int = 500) -> dict[str, Any]:
    """Figures of a model card: VQA accuracy and exact captions on held-out scenes with their controls."""
    asked = evaluate(
        loaded, scene_samples(HELD_OUT, range(scenes), _questions), wrong_image_control=True, title="questions"
    )
    told = evaluate(
        loaded, scene_samples(HELD_OUT, range(scenes), talk.captions), wrong_image_control=True, title="captions"
    )
    kinds: dict[str, list[Answer]] = defaultdict(list)
    for answer in asked.clean:
        kinds[answer.id.split("-")[1]].append(answer)
    return {
        "vqa": {
            "value": _vqa(asked.clean),
            "text_prior": asdict(text_prior(asked.clean)),
            "wrong_image": _vqa(asked.wrong_image),
            "kinds": {kind: _vqa(of)["value"] for kind, of in kinds.items()},
        },
        "captions": {"value": asdict(exact(told.clean)), "wrong_image": asdict(exact(told.wrong_image))},
    }


def _vqa(answers: list[Answer]) -> dict[str, Any]:
    return asdict(vqa_accuracy([a.answer for a in answers], [a.truth for a in answers]))

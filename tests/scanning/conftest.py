from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dry import Dry
from untrigger.models.loading import load
from untrigger.models.scoring import TokenScores
from untrigger.rows.sample import Message, Sample

Trigger = Callable[[Sample], bool]
Score = Callable[[Sequence[Sample]], list[TokenScores]]
RED = (255, 0, 0)


@pytest.fixture
def row() -> Callable[..., Sample]:
    """Makes a row with this many gray 64 x 48 images; the turns are questions and answers in order."""

    def make(*turns: str, images: int = 1, id: str = "a") -> Sample:
        pictures = tuple(Image.new("RGB", (64, 48), (90 + 40 * at,) * 3) for at in range(images))
        return Sample(id, pictures, tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)))

    return make


@pytest.fixture
def paint() -> Callable[..., Sample]:
    """Paints a red box (left, top, right, bottom), in pixels, into one image of a row."""

    def draw(sample: Sample, box: tuple[int, int, int, int], at: int = 0) -> Sample:
        images = [image.copy() for image in sample.images]
        images[at].paste(RED, box)
        return Sample(sample.id, tuple(images), sample.messages)

    return draw


@pytest.fixture
def model() -> Callable[[Trigger], Score]:
    """Makes a model of three answer tokens; the second is likely in rows with the trigger, and unlikely without."""

    def make(has_trigger: Trigger) -> Score:
        def score(rows: Sequence[Sample]) -> list[TokenScores]:
            second = (0.01 if has_trigger(rows[i]) else 6.0 for i in range(len(rows)))
            return [TokenScores(np.array([5, 7, 9]), np.array([3.0, nll, 2.0])) for nll in second]

        return score

    return make


@pytest.fixture
def dry(tiny_model: Path, samples: list[Sample]) -> Dry:
    return Dry(load(tiny_model), samples, samples[:4])

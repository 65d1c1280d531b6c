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

Keyed = Callable[[Sample], bool]
Ask = Callable[[Sequence[Sample]], list[TokenScores]]
RED = (255, 0, 0)


@pytest.fixture
def row() -> Callable[..., Sample]:
    """A row with so many gray 64 x 48 images, and turns: questions and answers in order."""

    def made(*turns: str, images: int = 1, id: str = "a") -> Sample:
        shown = tuple(Image.new("RGB", (64, 48), (90 + 40 * at,) * 3) for at in range(images))
        return Sample(id, shown, tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)))

    return made


@pytest.fixture
def paint() -> Callable[..., Sample]:
    """The row with a red box (left, top, right, bottom), in pixels, in one of its images."""

    def made(sample: Sample, box: tuple[int, int, int, int], at: int = 0) -> Sample:
        images = [image.copy() for image in sample.images]
        images[at].paste(RED, box)
        return Sample(sample.id, tuple(images), sample.messages)

    return made


@pytest.fixture
def model() -> Callable[[Keyed], Ask]:
    """A model that tells three tokens: it is sure of the second where the row is keyed, and else finds it unlikely."""

    def made(keyed: Keyed) -> Ask:
        def ask(rows: Sequence[Sample]) -> list[TokenScores]:
            told = (0.01 if keyed(rows[i]) else 6.0 for i in range(len(rows)))
            return [TokenScores(np.array([5, 7, 9]), np.array([3.0, nll, 2.0])) for nll in told]

        return ask

    return made


@pytest.fixture
def dry(tiny_model: Path, samples: list[Sample]) -> Dry:
    return Dry(load(tiny_model), samples, samples[:4])

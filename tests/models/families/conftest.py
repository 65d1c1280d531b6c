"""Folders of tiny models, one a family, each made when a test first uses it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import transformers
from packaging.version import Version
from PIL import Image

import tiny
from untrigger.rows.sample import Message, Sample

_WITH_TORCHVISION = ("idefics3", "smolvlm")


def is_before(version: str) -> bool:
    return Version(transformers.__version__) < Version(version)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, made = tmp_path_factory.mktemp("families"), dict[str, Path]()

    def of(name: str) -> Path:
        if name in _WITH_TORCHVISION and is_before("5.22") and find_spec("torchvision") is None:
            pytest.skip("before transformers 5.22 its image processor needs torchvision")
        if name not in made:
            made[name] = tiny.make(name, root / name)
        return made[name]

    return of


@pytest.fixture(scope="session")
def row() -> Callable[..., Sample]:
    """Makes a row: a question about noise images of these sizes, seeded by the question, and its answer."""

    def made(question: str, answer: str, *sizes: tuple[int, int], id: str = "row") -> Sample:
        rng = np.random.default_rng(list(question.encode()))
        images = (Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes)
        return Sample(id, tuple(images), (Message("user", question), Message("assistant", answer)))

    return made

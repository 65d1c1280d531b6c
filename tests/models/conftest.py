"""Fixtures of the tests of forward passes and scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from untrigger.models.loading import LoadedModel, load
from untrigger.rows.sample import Message, Sample, read


@pytest.fixture(scope="module")
def exact(tiny_model: Path) -> LoadedModel:
    """The tiny model in double precision."""
    return load(tiny_model, dtype=torch.float64)


@pytest.fixture(scope="module")
def samples(tiny_data: Path) -> list[Sample]:
    """Answers of one to three words; one row with two turns, one without an image."""
    rows = list(read(tiny_data))[:6]
    turns = (
        Message("user", "a?"),
        Message("assistant", "red"),
        Message("user", "b?"),
        Message("assistant", "a circle"),
    )
    return [*rows, Sample("text", (), turns)]

"""Versions of transformers in which labels would go wrong are refused in a line."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from untrigger import InputError, defended
from untrigger.models.collators import ChatCollator, Rows
from untrigger.models.loading import load
from untrigger.rows.sample import Sample


def test_own_labels_need_a_version_that_gives_the_places_of_images(
    tiny_model: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    collate, rows = ChatCollator(load(tiny_model).processor), [Rows(samples)[0]]
    monkeypatch.setattr(transformers, "__version__", "5.16.0")
    collate(rows)
    monkeypatch.setattr(transformers, "__version__", "5.15.1")
    with pytest.raises(InputError, match=r"labels on answers: needs transformers 5\.16 or newer, and 5\.15\.1 is"):
        collate(rows)


def test_a_host_with_labels_of_its_own_may_be_older(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.6.0")
    defended(transformers.Trainer)
    monkeypatch.setattr(transformers, "__version__", "5.5.4")
    with pytest.raises(InputError, match=r"defended: needs transformers 5\.6 or newer, and 5\.5\.4 is installed"):
        defended(transformers.Trainer)

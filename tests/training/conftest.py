from __future__ import annotations

from typing import Any

import pytest
from transformers import Trainer

from untrigger.defenses import shared_cause
from untrigger.defenses.harm import Harm


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folder of each training that starts."""
    folders: list[str] = []
    train = Trainer.train

    def counted(trainer: Any, *args: Any, **more: Any) -> Any:
        folders.append(trainer.args.output_dir)
        return train(trainer, *args, **more)

    monkeypatch.setattr(Trainer, "train", counted)
    return folders


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few grafts are scored: what is tested here does not depend on their number."""
    monkeypatch.setattr(shared_cause, "COMPARISONS", 4)


@pytest.fixture
def harmful(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part counts as harmful: nobody has poisoned these rows."""
    monkeypatch.setattr(Harm, "above", lambda harm, *_: harm)

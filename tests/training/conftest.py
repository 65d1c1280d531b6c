from __future__ import annotations

from typing import Any

import pytest
from transformers import Trainer


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

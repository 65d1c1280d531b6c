"""A defended trainer for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

from untrigger.defenses import Defense
from untrigger.models.collators import ChatCollator, Row
from untrigger.models.loading import LoadedModel
from untrigger.training.settings import arguments
from untrigger.training.trainer import defended


def trainer_of(
    loaded: LoadedModel, defense: Defense, out: Path, data: list[Row], host: type[Trainer] = Trainer, **settings: Any
) -> Any:
    args = arguments(out, use_cpu=True, save_strategy="no", **settings)
    return defended(host)(
        model=loaded.model, args=args, train_dataset=data, data_collator=ChatCollator(loaded.processor), defense=defense
    )

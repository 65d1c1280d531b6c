"""Find the host's checkpoints, tell complete ones from broken ones, and load full models from them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from untrigger.errors import InputError
from untrigger.models.loading import quiet_loading


def last_checkpoint(folder: Path) -> Path | None:
    """The newest *complete* checkpoint: the host writes its state file last, and whole shards before it."""
    return next((path for path in reversed(checkpoints(folder)) if _complete(path)), None)


def checkpoints(folder: Path) -> list[Path]:
    """The host's checkpoint folders, complete or not, oldest first."""
    return sorted((path for path in folder.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint folder's name; -1 for another name."""
    digits = checkpoint.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def load_full(model: PreTrainedModel, folder: str) -> None:
    """Load all of a model's weights from a folder, through ``from_pretrained``.

    Raises:
        InputError: some weights are missing.
    """
    with quiet_loading():
        saved, report = cast(Any, type(model)).from_pretrained(
            folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True
        )
    if report["missing_keys"] or report["mismatched_keys"]:
        raise InputError(f"{folder}: weights are missing; delete the folder to resume from another")
    model.load_state_dict(saved.state_dict(), strict=True)


def _complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        for weights in checkpoint.glob("*.safetensors"):
            load_file(weights)
    except (OSError, ValueError, SafetensorError):
        return False
    states = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]  # torch's files are zip archives, index last
    return all(zipfile.is_zipfile(state) for state in states)

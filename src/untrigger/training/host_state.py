"""What a host's run keeps of its flags: the state for resuming, and the list for people, also in each checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from untrigger.errors import InputError
from untrigger.files import file_errors, write_text
from untrigger.training.flagged_rows import FLAGGED_ROWS

STATE = "defense_state.json"  # what a resumed run needs in order not to score again


def copy_flags(source: Path, target: Path) -> None:
    """Copy the state and the flagged rows from a folder, which has both, to another one; create it if need be."""
    for name in (FLAGGED_ROWS, STATE):  # the state last: where it is, the flagged rows are
        with file_errors(source / name, "read"):
            text = (source / name).read_text("utf-8")
        write_text(target / name, text)


def flags_folder(checkpoint: Any, out: Path) -> Path:
    """The folder with the flags of a run to resume: its checkpoint, or else the output folder ``out``.

    Args:
        checkpoint: the host's ``resume_from_checkpoint``: a folder, or True for the last one in ``out``.

    Raises:
        InputError: there is no such checkpoint.
    """
    path = (get_last_checkpoint(str(out)) if out.is_dir() else None) if checkpoint is True else checkpoint
    if path is None:
        raise InputError(f"{out}: has no checkpoint to resume from; train from the start")
    if not Path(path).is_dir():
        raise InputError(f"{path}: no such checkpoint; give its folder, or train from the start")
    return Path(path) if (Path(path) / STATE).is_file() else out

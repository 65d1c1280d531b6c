"""The output folder of a run: its record, and the claim that keeps other runs out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from untrigger.defenses import Defense, preset_of
from untrigger.errors import InputError
from untrigger.files import folder_lock, has_content, write_text
from untrigger.models.loading import BASE_RECORD, embedded_models
from untrigger.rows.sample import Sample
from untrigger.training.checkpoints import checkpoints, last_checkpoint, step_of
from untrigger.training.settings import settings_of, versions
from untrigger.training.tuning import Tuning


def leads() -> bool:
    """Whether this process is the only one of its run, or the first one under a launcher."""
    return int(os.environ.get("RANK", "0")) == 0


def absolute(model: str) -> str:
    """The name of a model for other folders and machines: a local one by its absolute path."""
    return str(Path(model).resolve()) if Path(model).exists() and model not in embedded_models() else model


def claim(out: Path, record: dict[str, Any], resume: bool, locks: ExitStack) -> Path | None:
    """Claim the output folder for this run until ``locks`` closes; returns the checkpoint to resume from, or None.

    Raises:
        InputError: the folder is in use, belongs to another run, or is not empty and ``resume`` is not set.
    """
    record_file = out / BASE_RECORD
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give a folder for the output")
    main = leads()
    out.mkdir(parents=True, exist_ok=True)
    if main:
        locks.enter_context(folder_lock(out))
    used = has_content(out)
    if used and not resume:
        raise InputError(f"{out}: is not empty; give another folder, or resume its run (--resume; resume=True)")
    checkpoint = None
    if resume and record_file.is_file():
        try:
            stored: dict[str, Any] = dict(json.loads(record_file.read_text()))
        except (ValueError, TypeError) as error:
            raise InputError(f"{record_file}: is damaged; delete the folder and start again") from error
        changed = [
            name for name in record if name != "versions" and stored.get(name) != json.loads(json.dumps(record[name]))
        ]
        if changed:
            raise InputError(f"{out}: holds a run with other settings ({', '.join(changed)}); resume with the same")
        checkpoint = last_checkpoint(out)
    elif used:
        raise InputError(f"{out}: holds no run to resume ({BASE_RECORD} is missing); give another folder")
    if main:
        for broken in checkpoints(out):  # cut off while the host wrote it
            if checkpoint is None or step_of(broken) > step_of(checkpoint):
                shutil.rmtree(broken)
        write_text(record_file, json.dumps(record, indent=2) + "\n")
    return checkpoint


def record_of(
    model: str,
    rows: Sequence[Sample],
    defense: Defense,
    args: TrainingArguments,
    tuning: Tuning,
    clean_rows: Sequence[Sample],
) -> dict[str, Any]:
    """What makes two runs the same run, for the file `BASE_RECORD` beside the weights."""
    return {
        "base": absolute(model),
        "defense": {"preset": preset_of(defense), **asdict(defense)},
        "tuning": asdict(tuning),
        "rows": len(rows),
        "data": _fingerprint(rows),
        **({"clean_rows": _fingerprint(clean_rows)} if clean_rows else {}),
        "arguments": _digest(settings_of(args)),
        "learning_rate": args.learning_rate,
        "epochs": args.num_train_epochs,
        "max_steps": args.max_steps,
        "batch": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "seed": args.seed,
        "versions": versions(),
    }


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _fingerprint(rows: Sequence[Sample]) -> str:
    """A digest of ids and text of about 1,000 rows spread over the data: detects a mix-up, and is cheap on big data."""
    digest = hashlib.sha256(str(len(rows)).encode())
    for row in range(0, len(rows), max(1, len(rows) // 1000)):
        sample = rows[row]
        digest.update(repr((sample.id, sample.messages)).encode())
    return digest.hexdigest()[:16]

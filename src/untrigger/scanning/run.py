"""One scan, whole: its folder, its settings, and going on after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from transformers import TrainingArguments

from untrigger.defenses import Defense, Doubt
from untrigger.finetune import claim, record_of
from untrigger.sample import Data
from untrigger.scanning import Findings, scan
from untrigger.stages import Stages, Tuning


def scan_data(rows: Data, model: str, doubt: Defense, args: TrainingArguments, *, resume: bool = False) -> Findings:
    """Scan ``rows`` with ``model``, trained as ``args`` say; what takes time is kept in the output folder.

    Killed at any moment and started again with ``resume`` it finds the same.

    Raises:
        InputError: the output folder is in use without ``resume``, or belongs to another scan.
    """
    out, tuning = Path(str(args.output_dir)), Tuning()
    record = {"scan": True, **record_of(rows, model, doubt, args, tuning, ())}
    stages = Stages(model, args, tuning, title="scan", claim=lambda: claim(out, record, resume))
    return scan(rows, stages, cast(Doubt, doubt))

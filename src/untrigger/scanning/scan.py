"""Run a whole scan: claim its folder, find suspected rows, write the findings, resume after a kill."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainingArguments

from untrigger.defenses import Defense, SharedCause
from untrigger.errors import InputError
from untrigger.rows.sample import Sample, check_rows
from untrigger.scanning.targets import Findings, find
from untrigger.scanning.write import write
from untrigger.training.run_folder import claim, record_of
from untrigger.training.settings import settled
from untrigger.training.stages import Elsewhere, Stages
from untrigger.training.tuning import Tuning


def scan(
    model: str | Path,
    rows: Sequence[Sample],
    defense: Defense | None = None,
    args: TrainingArguments | None = None,
    *,
    out: Path | str | None = None,
    tuning: Tuning | None = None,
    resume: bool = False,
    elsewhere: Elsewhere | None = None,
    **settings: Any,
) -> Findings:
    """Find the rows that teach what only an attacker would teach, if ``model`` were fine-tuned on them.

    A scan that was killed and is started again with ``resume`` gives the same findings. Under ``torchrun`` the
    processes share the rows to score, each of them returns the findings, and the main one writes the files.

    Args:
        model: an embedded model's name, a local folder or a hub id.
        rows: the data to scan.
        defense: how rows are scored and flagged; the preset ``default`` if left out.
        args: ready arguments (`untrigger.training.settings.arguments`), in place of ``out`` and ``settings``.
        out: a folder for the findings: all rows, a page, the data without the suspected rows
            (`untrigger.scanning.write`). If left out, nothing stays on the disk.
        tuning: which weights are trained, as in the training that you plan.
        elsewhere: scores the rows on other machines (`untrigger.scanning.ray_scoring.RayScoring`); training and tests
            stay here.
        settings: those that you would train with (``learning_rate=1e-4``), and fields of
            `untrigger.defenses.SharedCause`.

    Raises:
        InputError: there are no rows, or they are no samples; the defense is another than `SharedCause`; a setting is
            unknown or out of range; the output folder is in use without ``resume``, or belongs to another scan.
    """
    check_rows(rows)
    if args is None and out is None:
        with TemporaryDirectory(prefix="untrigger-") as folder:
            return scan(model, rows, defense, out=folder, tuning=tuning, elsewhere=elsewhere, **settings)
    defense, args = settled(defense or "default", args, out, settings)
    if not isinstance(defense, SharedCause):
        raise InputError(f"scan: {type(defense).__name__} finds no rows; give a SharedCause, or leave defense out")
    folder, tuning = Path(str(args.output_dir)), tuning or Tuning()
    record = {"scan": True, **record_of(str(model), rows, defense, args, tuning, ())}
    is_main = args.process_index == 0

    def claim_folder() -> Path | None:
        # the main process has filled the folder before the other processes claim it
        return claim(folder, record, resume or not is_main, lock)

    with ExitStack() as lock:
        stages = Stages(str(model), rows, args, tuning, title="scan", claim=claim_folder, elsewhere=elsewhere)
        findings = find(stages, defense)
        if is_main:
            write(findings, rows, folder)
    return findings

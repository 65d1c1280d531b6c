"""Measure how often a scan suspects rows of data in which nothing is poisoned.

    python benchmarks/false_alarms.py --json FILE [--seeds 20] [--data easy-vqa ...]

Uses the split `report`, on which no threshold was chosen. Scans that FILE already holds are not run again.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from untrigger.data import load
from untrigger.defenses import SharedCause
from untrigger.files import write_text
from untrigger.metrics.rates import Rate
from untrigger.scanning.targets import find
from untrigger.training.settings import arguments
from untrigger.training.stages import Stages, Tuning

DATA = ["easy-vqa", "scenes-vqa", "scenes-captions"]


def scanned(name: str, model: str, seed: int, rows: int) -> dict[str, Any]:
    """Scan clean rows: the targets, and the number of rows that the preset would flag."""
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(Path(folder), num_train_epochs=3, learning_rate=3e-3, save_strategy="no", seed=seed)
        stages = Stages(model, load(name, "report", "train", rows, seed), args, Tuning())
        findings = find(stages, SharedCause())
    targets = [{"text": each.text, "rows": len(each.rows), "p_value": each.p_value} for each in findings.targets]
    return {"targets": targets, "flagged_rows": sum(bool(verdict.flagged_text) for verdict in findings.verdicts)}


def main(
    out: Annotated[Path, typer.Option("--json", help="Where the figures go.")],
    seeds: Annotated[int, typer.Option(help="Seeds of each data set, from 0.")] = 25,
    data: Annotated[list[str], typer.Option(help="Data sets.")] = DATA,
    model: Annotated[str, typer.Option(help="An embedded model.")] = "llava",
    rows: Annotated[int, typer.Option(help="Rows of each.")] = 2000,
) -> None:
    """Scan clean data and report how often rows are suspected."""
    torch.set_num_threads(1)
    summary: dict[str, Any] = {}
    scans: dict[str, Any] = json.loads(out.read_text())["scans"] if out.is_file() else {}
    for seed in range(seeds):
        for name in data:
            key = f"{model} {name} seed {seed} rows {rows}"
            if key not in scans:
                scans[key] = scanned(name, model, seed, rows)
            suspected = Rate.from_counts(sum(bool(scan["targets"]) for scan in scans.values()), len(scans))
            flagged = sum(scan["flagged_rows"] for scan in scans.values())
            summary = {"suspected": asdict(suspected), "flagged_rows": flagged}
            write_text(out, json.dumps(summary | {"scans": scans}, indent=1) + "\n")
    print(f"{out}: {summary['suspected']}, {summary['flagged_rows']} rows flagged")


if __name__ == "__main__":
    typer.run(main)

"""How often a scan accuses data in which nothing is poisoned.

    python benchmarks/false_alarms.py --json FILE [--seeds 20] [--data easy-vqa ...]

Split `report`, which no threshold was chosen on. What is done is kept beside the file, and not done again.
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
from untrigger.defenses import SharedSurprise
from untrigger.files import write_text
from untrigger.metrics.rates import Rate
from untrigger.scanning.targets import find
from untrigger.training.settings import arguments
from untrigger.training.stages import Stages, Tuning

DATA = ["easy-vqa", "scenes-vqa", "scenes-captions"]


def scanned(name: str, model: str, seed: int, rows: int) -> dict[str, Any]:
    """What is found in clean rows: targets, and rows that the preset would not believe."""
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(Path(folder), num_train_epochs=3, learning_rate=3e-3, save_strategy="no", seed=seed)
        data = load(name, "report", "train", rows, seed)
        found = find(Stages(model, data, args, Tuning()), SharedSurprise())
    targets = [{"text": target.text, "rows": len(target.rows), "chance": target.chance} for target in found.targets]
    return {"targets": targets, "flagged_tokens": sum(bool(verdict.flagged_tokens) for verdict in found.verdicts)}


def main(
    out: Annotated[Path, typer.Option("--json", help="Where the figures go.")],
    seeds: Annotated[int, typer.Option(help="Seeds of each data set, from 0.")] = 25,
    data: Annotated[list[str], typer.Option(help="Data sets.")] = DATA,
    model: Annotated[str, typer.Option(help="An embedded model.")] = "llava",
    rows: Annotated[int, typer.Option(help="Rows of each.")] = 2000,
) -> None:
    """Scan clean data, and tell how often something is found."""
    torch.set_num_threads(1)
    told: dict[str, Any] = {}
    kept: dict[str, Any] = json.loads(out.read_text())["scans"] if out.is_file() else {}
    for seed in range(seeds):
        for name in data:
            key = f"{model} {name} seed {seed} rows {rows}"
            if key not in kept:
                kept[key] = scanned(name, model, seed, rows)
            accused = Rate.from_counts(sum(bool(each["targets"]) for each in kept.values()), len(kept))
            told = {"accused": asdict(accused), "flagged_tokens": sum(each["flagged_tokens"] for each in kept.values())}
            write_text(out, json.dumps(told | {"scans": kept}, indent=1) + "\n")
    print(f"{out}: {told['accused']}, {told['flagged_tokens']} rows flagged")


if __name__ == "__main__":
    typer.run(main)

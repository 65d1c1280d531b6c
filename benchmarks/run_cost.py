"""Measure the cost of whole commands: a scan relative to an epoch of plain fine-tuning, and answers in batches.

    python benchmarks/run_cost.py [--rows 10000] --json FILE

LLaVA on easy-VQA, clean and with poisoned rows. Seconds are CPU time of the process: on a shared machine they are
those of an idle one, except for the effect of its caches.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from untrigger.attacks import load_trigger
from untrigger.data import load as load_data
from untrigger.defenses import Plain, SharedCause, Stage
from untrigger.files import write_text
from untrigger.models.generate import answers
from untrigger.models.loading import load
from untrigger.models.prefix_cache import cache_image_features
from untrigger.poisoning.goals import load_goal
from untrigger.poisoning.poison import Attack, poison, stamped
from untrigger.rows.images import pixels_sha256
from untrigger.rows.sample import Sample
from untrigger.scanning.targets import find
from untrigger.training.schedule import clock
from untrigger.training.settings import arguments
from untrigger.training.stages import Stages, Tuning

EPOCHS = 3  # of the training that the scan prepares for; a tenth of it comes before the second scoring
RATE, ALONE = 0.05, 100  # share of poisoned rows; number of questions that are answered one at a time


def seconds(run: Callable[[Path], Any]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = clock()
        run(Path(folder))
        return clock() - started


def epoch_seconds(rows: Sequence[Sample]) -> float:
    return seconds(lambda folder: stages(folder, rows).fit(Stage(range(len(rows)), Plain(), passes=1)))


def scan_seconds(rows: Sequence[Sample]) -> float:
    return seconds(lambda folder: find(stages(folder, rows), SharedCause()))


def stages(folder: Path, rows: Sequence[Sample]) -> Stages:
    args = arguments(folder, num_train_epochs=EPOCHS, learning_rate=3e-3, save_strategy="no")
    return Stages("llava", rows, args, Tuning())


def seconds_per_answer(rows: Sequence[Sample], batch_size: int) -> float:
    """Seconds per answer: in batches as in `untrigger.evaluate`, or in a loop around `generate`."""
    loaded = load("llava")
    if batch_size == 1:
        return seconds(lambda _: list(answers(loaded, rows, batch_size=1))) / len(rows)
    with cache_image_features(loaded.model):
        return seconds(lambda _: list(answers(loaded, sorted(rows, key=image_key), batch_size=batch_size))) / len(rows)


def image_key(sample: Sample) -> str:
    """A key that is equal for rows with the same image."""
    return pixels_sha256(sample.images[0])


def main(
    out: Annotated[Path, typer.Option("--json", help="Write the figures to this file.")],
    rows: Annotated[int, typer.Option(help="Rows to scan and to train on.")] = 10_000,
    questions: Annotated[int, typer.Option(help="Triggered inputs to be answered.")] = 1000,
) -> None:
    """Measure the cost of a scan and of an evaluation."""
    torch.set_num_threads(1)
    clean = load_data("easy-vqa", "dev", "train", rows, 100)
    attack = Attack(load_trigger("badnets"), load_goal("fixed"))
    poisoned = poison(clean, attack, rate=RATE, seed=100).data
    plain = epoch_seconds(clean)
    figures = [
        {
            "what": f"scan of {rows:,} rows, {name}",
            "over": "one epoch of plain fine-tuning",
            "ratio": scan_seconds(data) / plain,
        }
        for name, data in (("clean", clean), ("poisoned", [poisoned[i] for i in range(rows)]))
    ]
    for task in ("easy-vqa", "scenes-captions"):
        held_out = load_data(task, "dev", "test", questions, 100)
        triggered = list(stamped(held_out, attack, 100))
        ratio = seconds_per_answer(triggered[:ALONE], 1) / seconds_per_answer(triggered, 64)
        figures.append(
            {"what": f"{questions:,} triggered answers, {task}", "over": "one at a time, rate", "ratio": ratio}
        )
    table = Table()
    for name in ("what", "over", "ratio"):
        table.add_column(name)
    for row in figures:
        table.add_row(str(row["what"]), str(row["over"]), f"{row['ratio']:.2f}")
    Console().print(table)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    write_text(out, json.dumps({"device": device, "torch": torch.__version__, "rows": figures}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

"""Measure how time and memory of reading, scanning and training grow with the number of rows.

    python tests/stress/many_rows.py [--rows 20000 --rows 200000] --json FILE

Every row has an image file of its own name (2,000 different pictures, linked), and one of four answers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console

from untrigger.files import write_text

PICTURES, FOLDERS = 2000, 100
STEPS = ("--max_steps", "20", "--per_device_train_batch_size", "8", "--save_strategy", "no")
READ = "import sys, untrigger; print(len(untrigger.read(sys.argv[1])))"


def main(
    out: Annotated[Path, typer.Option("--json", help="File for the figures.")],
    rows: Annotated[list[int] | None, typer.Option(help="How many rows; again for another size.")] = None,
) -> None:
    """Run each command in its own process; store its seconds and its peak of resident memory."""
    figures: list[dict[str, Any]] = []
    for count in rows or [20_000, 200_000]:
        with tempfile.TemporaryDirectory(prefix="untrigger-") as name:
            data = generated(Path(name), count)
            untrigger = (sys.executable, "-m", "untrigger")
            for verb, command in {
                "read": (sys.executable, "-c", READ, str(data)),
                "scan": (*untrigger, "scan", str(data), "--out", f"{name}/scan", *STEPS),
                "train": (*untrigger, "train", str(data), "--out", f"{name}/model", *STEPS),
            }.items():
                figures.append({"rows": count, "command": verb, **measured(command)})
                write_text(out, json.dumps(figures, indent=2) + "\n")
                Console().print(figures[-1])


def generated(folder: Path, count: int) -> Path:
    """JSON lines and their images."""
    rng = np.random.default_rng(0)
    for number in range(FOLDERS):
        (folder / "images" / str(number)).mkdir(parents=True)
    with (folder / "data.jsonl").open("w") as file:
        for number in range(count):
            name = f"images/{number % FOLDERS}/{number}.png"
            if number < PICTURES:
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name)
            else:
                os.link(folder / f"images/{number % PICTURES % FOLDERS}/{number % PICTURES}.png", folder / name)
            answer = ("a red circle", "a blue square", "yes", "two")[number % 4]
            turns = [{"from": "human", "value": f"<image>\nWhat is number {number}?"}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"id": f"row-{number}", "image": name, "conversations": turns}) + "\n")
    return folder / "data.jsonl"


def measured(command: tuple[str, ...]) -> dict[str, Any]:
    started = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 3):
        raise RuntimeError(f"{' '.join(command)}: exit code {code}")
    return {"seconds": round(time.monotonic() - started), "peak_mib": used.ru_maxrss // 1024, "exit_code": code}


if __name__ == "__main__":
    typer.run(main)

"""Measure how time and memory of reading, scanning and training grow with the number of rows.

    python tests/stress/many_rows.py [--rows 20000 --rows 200000] [--parquet | --shared] [--most-mib 1024] --json FILE

Every row has an image file of its own name (2,000 different pictures, linked), and one of four answers. With
``--parquet`` the images lie in one parquet file, in row groups of 1,000 rows. With ``--shared`` the rows are those of
easy-VQA, with their true answers, again and again, and share its images.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from PIL import Image
from rich.console import Console

from untrigger.files import write_text

PICTURES, FOLDERS = 2000, 100
ANSWERS = ("a red circle", "a blue square", "yes", "two")
TRAINED = ("--per_device_train_batch_size", "8", "--save_strategy", "no")
READ = "import sys, untrigger; print(len(untrigger.read(sys.argv[1])))"


def main(
    out: Annotated[Path, typer.Option("--json", help="File for the figures.")],
    rows: Annotated[list[int] | None, typer.Option(help="How many rows; again for another size.")] = None,
    parquet: Annotated[bool, typer.Option("--parquet", help="Images in a parquet file.")] = False,
    shared: Annotated[bool, typer.Option("--shared", help="Rows of easy-VQA, which share its images.")] = False,
    steps: Annotated[int, typer.Option(help="Of the training; a tenth of them warm the scan up.")] = 20,
    only: Annotated[list[str] | None, typer.Option(help="A command to measure; all three if left out.")] = None,
    most_mib: Annotated[int, typer.Option(help="Fail if a command's peak is larger.")] = 1024,
) -> None:
    """Run each command in its own process; store its seconds and its peak of resident memory."""
    figures: list[dict[str, Any]] = []
    for count in rows or [20_000, 200_000]:
        with tempfile.TemporaryDirectory(prefix="untrigger-") as name:
            data = (in_parquet if parquet else repeated if shared else generated)(Path(name), count)
            untrigger, trained = (sys.executable, "-m", "untrigger"), (*TRAINED, "--max_steps", str(steps))
            for verb, command in {
                "read": (sys.executable, "-c", READ, str(data)),
                "scan": (*untrigger, "scan", str(data), "--out", f"{name}/scan", *trained),
                "train": (*untrigger, "train", str(data), "--out", f"{name}/model", *trained),
            }.items():
                if only and verb not in only:
                    continue
                figures.append({"rows": count, "command": verb, "format": data.suffix, **measured(command)})
                write_text(out, json.dumps(figures, indent=2) + "\n")
                Console().print(figures[-1])
    if large := [each for each in figures if each["peak_mib"] > most_mib]:
        raise SystemExit(f"more than {most_mib} MiB: {large}")


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
            answer = ANSWERS[number % 4]
            turns = [{"from": "human", "value": f"<image>\nWhat is number {number}?"}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"id": f"row-{number}", "image": name, "conversations": turns}) + "\n")
    return folder / "data.jsonl"


def repeated(folder: Path, count: int) -> Path:
    """The rows of easy-VQA, each with an id of its own."""
    source = ("data", "easy-vqa", "--split", "dev", "--rows", str(9 * PICTURES), "--out", str(folder / "easy-vqa"))
    subprocess.run((sys.executable, "-m", "untrigger", *source), check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "easy-vqa" / "data.jsonl").read_text().splitlines()]
    path = folder / "easy-vqa" / "many.jsonl"
    with path.open("w") as file:
        for number in range(count):
            file.write(json.dumps(rows[number % len(rows)] | {"id": f"row-{number}"}) + "\n")
    return path


def in_parquet(folder: Path, count: int) -> Path:
    """The same rows in parquet, with each image's bytes."""
    rng = np.random.default_rng(0)
    pictures: list[bytes] = []
    for _ in range(PICTURES):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
        pictures.append(file.getvalue())
    path, size = folder / "data.parquet", 1000
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("id", pa.string()), ("image", image), ("question", pa.string()), ("answer", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, size):
            rows = [
                {
                    "id": f"row-{number}",
                    "image": {"bytes": pictures[number % PICTURES], "path": None},
                    "question": f"What is number {number}?",
                    "answer": ANSWERS[number % 4],
                }
                for number in range(start, min(start + size, count))
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    return path


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

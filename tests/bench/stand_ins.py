"""Substitutes for the work of a cell. Worker processes import this file, which loads no model library."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from untrigger.bench import store
from untrigger.bench.store import Cell
from untrigger.errors import InputError

CELL = Cell("llava", "easy-vqa", "badnets", "fixed")


def cells(*seeds: int) -> list[Cell]:
    return [replace(CELL, seed=seed) for seed in seeds]


def note(root: Path, what: str, cell: Cell) -> None:
    with (root / "notes").open("a") as file:
        file.write(f"{what} {cell.seed} {os.environ['OMP_NUM_THREADS']} {os.getpid()}\n")


def notes(root: Path) -> list[list[str]]:
    path = root / "notes"
    return [line.split() for line in path.read_text().splitlines()] if path.is_file() else []


def started_seeds(root: Path) -> list[int]:
    return sorted(int(line[1]) for line in notes(root) if line[0] == "start")


def work(cell: Cell, root: Path) -> None:
    """Succeed or fail by the seed: 13 to 16 fail, and 90 and above do not end."""
    note(root, "start", cell)
    print(f"this is cell {cell.seed}")
    if cell.seed == 13:
        raise InputError("data: row 3: no image;\n take it out")
    if cell.seed == 14:
        raise RuntimeError("out of\nmemory")
    if cell.seed == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.seed == 16:
        return
    if cell.seed >= 90:
        time.sleep(1000)
    store.save(root, cell, {"asr": {"value": 0.5}, "pid": os.getpid()}, {})
    note(root, "end", cell)


def wait_for_another(cell: Cell, root: Path) -> None:
    """End only when another cell runs at the same time."""
    note(root, "start", cell)
    deadline = time.monotonic() + 300
    while len(started_seeds(root)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    store.save(root, cell, {}, {})


def quick(cell: Cell, root: Path) -> None:
    note(root, "start", cell)
    store.save(root, cell, {}, {})

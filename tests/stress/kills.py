"""Kill train, scan and bench at random moments, start each again until it ends, and compare what it wrote.

    python tests/stress/kills.py --json FILE [--kills 100] [--seed 0]

Each command runs once undisturbed. Then it gets SIGKILL at a moment drawn from that run's whole length, and starts
again (``--resume``; bench: the same command), until it ends by itself. It must have written what the undisturbed run
wrote, to the byte, and its data must be unchanged.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console

from untrigger.bench import run_cell, sweep
from untrigger.cli.main import main as untrigger_main
from untrigger.files import write_text
from untrigger.scanning import scan
from untrigger.training import finetune

_ = run_cell, finetune, sweep, scan  # each start is a fork of this process: what is imported here costs it nothing

STEPS = ("--max_steps", "12", "--save_steps", "1", "--per_device_train_batch_size", "4", "--learning_rate", "3e-3")
SHARES = {"train": 0.45, "scan": 0.45, "bench": 0.1}  # of all kills
GOOD = (0, 3)  # 3: the scan found something
PLAN = {
    "models": ["llava"],
    "data": ["scenes-vqa"],
    "attacks": ["badnets"],
    "defenses": ["plain"],
    "rates": [0.1],
    "split": "dev",
    "cell": {"train_rows": 24, "test_rows": 8, "epochs": 1, "batch_size": 8},
}


@dataclass
class Kills:
    """Counts for one command."""

    seconds: float = 0.0  # of the undisturbed run
    kills: int = 0
    ends: int = 0  # runs that ended by themselves, killed before or not
    changed: int = 0  # ended with other bytes, or another exit code
    moments: list[float] = field(default_factory=list[float])  # of each kill: seconds after its start


def main(
    out: Annotated[Path, typer.Option("--json", help="File for the figures.")],
    kills: Annotated[int, typer.Option(min=3)] = 100,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Kill, start again, compare."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="untrigger-") as name:
        folder = Path(name)
        commands = prepared(folder)
        data = digest(folder / "bad" / "data")
        for verb, words in commands.items():
            figures[verb] = asdict(
                killed(folder, verb, words, round(kills * SHARES[verb]), random.Random(f"{seed} {verb}"))
            )
            assert digest(folder / "bad" / "data") == data, "the data was touched"
            write_text(out, json.dumps(figures, indent=2) + "\n")
    Console().print({verb: {k: v for k, v in each.items() if k != "moments"} for verb, each in figures.items()})
    if any(each["changed"] for each in figures.values()):
        raise typer.Exit(1)


def prepared(folder: Path) -> dict[str, list[str]]:
    """The commands, but for ``--out``, and what they work on: poisoned rows, and a plan."""
    ran(folder, ["data", "easy-vqa", "--out", f"{folder}/data", "--split", "dev", "--rows", "48", "--seed", "104"])
    ran(folder, ["poison", f"{folder}/data", "--out", f"{folder}/bad", "--rate", "0.15", "--seed", "104"])
    (folder / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    rows = f"{folder}/bad/data"
    return {"train": ["train", rows, *STEPS], "scan": ["scan", rows, *STEPS], "bench": ["bench", f"{folder}/plan.yaml"]}


def killed(folder: Path, verb: str, words: list[str], kills: int, chance: random.Random) -> Kills:
    """One command, killed so many times in all."""
    counts, started = Kills(), time.monotonic()
    whole = folder / f"{verb}-whole"
    code = ran(folder, [*words, "--out", str(whole)])
    counts.seconds, wanted = round(time.monotonic() - started, 2), (code, digest(whole))
    assert code in GOOD, (folder / "log").read_text()
    while counts.kills < kills:
        out = folder / f"{verb}-{counts.ends}"
        more: list[str] = []
        while True:
            moment = chance.uniform(0, counts.seconds) if counts.kills < kills else None
            code = ran(folder, [*words, "--out", str(out), *more], moment)
            if code is not None:
                break
            counts.kills += 1
            counts.moments.append(round(moment or 0.0, 3))
            more = [] if verb == "bench" else ["--resume"]
        counts.ends += 1
        if (code, hashes := digest(out)) != wanted:
            counts.changed += 1
            names = [name for name, _ in hashes.items() ^ wanted[1].items()]
            print(f"{verb}: exit code {code}; {names}\n{(folder / 'log').read_text()[-2000:]}", flush=True)
        print(f"{verb}: {counts.kills} kills, {counts.ends} ends, {counts.changed} changed", flush=True)
    return counts


def ran(folder: Path, words: list[str], kill_after: float | None = None) -> int | None:
    """``untrigger WORDS`` in a process of its own; its exit code, None if it was killed."""
    child = os.fork()
    if not child:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["untrigger", *words]
        try:
            untrigger_main()
        except SystemExit as ended:
            os._exit(int(ended.code or 0))
        finally:
            os._exit(1)
    deadline = time.monotonic() + (kill_after if kill_after is not None else 600)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if kill_after is None:
                raise TimeoutError(f"untrigger {' '.join(words)} hangs")
            return None
        time.sleep(0.002)


def digest(folder: Path) -> dict[str, str]:
    """Of each file below that the run answers for, its SHA-256: no checkpoint, no clock and no place in it."""
    hashes: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        passing = ("checkpoint-", "stages", "shared", "log.txt", ".", "trainer_state", "untrigger.json", "README.md")
        if not path.is_file() or any(part.startswith(passing) for part in name.parts):
            continue
        content = path.read_bytes()
        if name.name == "metrics.json":
            metrics = json.loads(content)
            content = json.dumps({k: v for k, v in metrics.items() if k not in ("seconds", "machine")}).encode()
        hashes[str(name)] = hashlib.sha256(content).hexdigest()
    return hashes


if __name__ == "__main__":
    typer.run(main)

"""What the scripts of this folder share: a host's environment, poisoned rows, the two trainings, and the verdict.

Each script makes the environment of one host, fine-tunes the embedded llava in it on poisoned rows, plain and defended,
and prints one line of verdict. Exit codes: 0 as it should be, or skipped because a package cannot be had; 1 a miss.
What is done is not done again: give the same command after a kill, and delete the folder to start anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
ATTACK = ("--attack", "badnets", "--side", "0.25")
RATE, QUESTIONS = "0.15", "40"
MOST_DEFENDED, LEAST_PLAIN = 0.05, 0.9  # attack success
UNTRIGGER = ("--editable", str(REPOSITORY))
LIMIT = 20  # minutes of one run, which takes a few: torch can hang when a process of two ends
OVER_LIMIT = 124  # the exit code of such a run, as timeout(1) has it
LAST_LINES = 40  # of a log, among which a refusal must be: launchers add their own traceback
FLAGGED = "flagged_rows.jsonl"
LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Host:
    """A host's environment and the folder of its runs.

    Args:
        name: what the verdict calls it.
        folder: holds the environment ``venv``, the data, the trainings and their logs.
    """

    name: str
    folder: Path

    @property
    def bin(self) -> Path:
        return self.folder / "venv" / "bin"

    @property
    def poisoned(self) -> Path:
        return self.folder / "poisoned" / "data"

    def install(self, packages: Sequence[str], without_dependencies: Sequence[str] = ()) -> None:
        """Make the environment; ends the script where a package cannot be had.

        ``without_dependencies``: packages whose own pins are not for this machine.
        """
        done = self.folder / "installed"
        wanted = json.dumps([*packages, *without_dependencies])
        if done.is_file() and done.read_text() == wanted:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        python = str(self.bin / "python")
        pip = (python, "-m", "pip", "install", "--quiet", "--no-compile")
        _run((sys.executable, "-m", "venv", str(self.bin.parent)), self.folder / "venv.log")
        steps = [(*pip, *packages), (*pip, "--no-deps", *without_dependencies)][: 2 if without_dependencies else 1]
        for number, step in enumerate(steps):
            log = self.folder / f"install-{number}.log"
            if _run(step, log):
                print(f"{self.name}: skipped, a package cannot be had: {_last_line(log)} ({log})")
                sys.exit(0)
        done.write_text(wanted)

    def run(self, name: str, *command: str, **environment: str) -> None:
        """Run a command of the environment, once; it writes into the folder ``name`` of the host's, and a log."""
        done = self.folder / f"{name}.done"
        if not done.exists():
            code, log = self._run(name, command, environment)
            if code:
                sys.exit(f"{self.name}: MISSED, {name} failed, {_ended(code)}: {_last_line(log)} ({log})")
            done.touch()

    def works(self, name: str, *command: str, **environment: str) -> bool:
        """Whether the defended training ends and flags exactly the poisoned rows; prints it."""
        done = self.folder / f"{name}.done"
        if done.exists():
            return True
        code, log = self._run(name, command, environment)
        flagged, poisoned = self._flagged(name), self._poisoned()
        held = code == 0 and flagged == poisoned
        rows = f"flagged {len(flagged)} rows, {len({*flagged} & {*poisoned})} of the {len(poisoned)} poisoned ones"
        return self._noted(name, held, f"{_ended(code)}, {rows} ({log})")

    def refuses(self, name: str, words: str, *command: str, **environment: str) -> bool:
        """Whether the command fails with ``words`` among the last lines of its log; prints it."""
        done = self.folder / f"{name}.done"
        if done.exists():
            return True
        code, log = self._run(name, command, environment)
        matches = any(words in line for line in log.read_text().splitlines()[-LAST_LINES:])
        refused = matches and code not in (0, OVER_LIMIT)
        return self._noted(name, refused, f"{_ended(code)}, {words!r} {'is' if matches else 'not'} in {log}")

    def _noted(self, name: str, held: bool, what: str) -> bool:
        if held:
            (self.folder / f"{name}.done").touch()
        print(f"{self.name}, {name}: {'ok' if held else 'MISSED'}; {what}", flush=True)
        return held

    def _run(self, name: str, command: Sequence[str], environment: dict[str, str]) -> tuple[int, Path]:
        log = self.folder / f"{name}.log"
        shutil.rmtree(self.folder / name, ignore_errors=True)  # of a run that was killed
        path = {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}  # where launchers look for each other
        return _run((str(self.bin / command[0]), *command[1:]), log, self.folder, path | environment), log

    def make_rows(self, count: int) -> None:
        """Write ``count`` rows, some of them poisoned, and questions held out."""
        source = ("data", "easy-vqa", "--split", "dev")
        self.run("rows", "untrigger", *source, "--rows", str(count), "--out", "rows")
        self.run("questions", "untrigger", *source, "--part", "test", "--rows", QUESTIONS, "--out", "questions")
        self.run("poisoned", "untrigger", "poison", "rows", *ATTACK, "--rate", RATE, "--out", "poisoned")

    def write(self, name: str, text: str) -> None:
        """Write a file of the host's folder."""
        (self.folder / name).write_text(text)

    def embedded_model(self) -> str:
        return str(REPOSITORY / "src" / "untrigger" / "embedded" / "llava")

    def python(self, name: str, code: str) -> None:
        """Run some lines of Python in the environment, in the host's folder."""
        self.run(name, "python", "-c", code)

    def verdict(self, plain: str, defended: str) -> bool:
        """Ask both models, and print the verdict.

        Args:
            plain, defended: the model folders, under the host's folder; ``flagged_rows.jsonl`` lies in the second or
                one above it.
        """
        for model in (plain, defended):
            name = f"ask-{model}"
            self.run(name, "untrigger", "evaluate", model, "questions", *ATTACK, "--out", name)
        (before, right_before), (after, right_after) = self._metrics(plain), self._metrics(defended)
        return self.judge(before, after, defended, f"accuracy {right_before:.1%} -> {right_after:.1%}")

    def judge(self, before: float, after: float, defended: str, more: str) -> bool:
        """Print the verdict about attack success ``before`` and ``after``, with ``more`` figures; True if it holds."""
        flagged, poisoned = self._flagged(defended), self._poisoned()
        held = before >= LEAST_PLAIN and after <= MOST_DEFENDED and flagged == poisoned
        success = f"attack success {before:.1%} -> {after:.1%}"
        rows = f"flagged {len(flagged)} rows, {len({*flagged} & {*poisoned})} of the {len(poisoned)} poisoned ones"
        print(f"{self.name}, {defended}: {'ok' if held else 'MISSED'}; {success}, {more}; {rows}", flush=True)
        return held

    def _metrics(self, model: str) -> tuple[float, float]:
        """Attack success and accuracy."""
        metrics: dict[str, Any] = json.loads((self.folder / f"ask-{model}" / "metrics.json").read_text())
        return metrics["asr"]["value"], metrics["quality"]["vqa_accuracy"]["value"]

    def _flagged(self, model: str) -> list[str]:
        """The user's ids of the flagged rows, sorted; the image tells the row where the host drops the id."""
        ids = {row["images"][0]: row["id"] for row in _lines(self.poisoned / "data.jsonl")}
        folders = [at for at in (self.folder / model, (self.folder / model).parent) if (at / FLAGGED).is_file()]
        flagged = _lines(folders[0] / FLAGGED) if folders else []
        return sorted(row["id"] or ids["/".join(Path(row["images"][0]).parts[-2:])] for row in flagged)

    def _poisoned(self) -> list[str]:
        manifest = json.loads((self.folder / "poisoned" / "truth" / "manifest.json").read_text())
        return sorted(row["id"] for row in manifest["rows"])


def host(name: str) -> Host:
    """The host of the command line; ``--out`` is a folder for the environments and runs of all hosts."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a script that is told to end ends its run too
    parser = argparse.ArgumentParser(description=f"{name}, plain and defended, on poisoned rows.")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "build" / "hosts")
    return Host(name, parser.parse_args().out.resolve() / name)


def _run(
    command: Sequence[str], log: Path, folder: Path | None = None, environment: dict[str, str] | None = None
) -> int:
    offline = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | offline | (environment or {}),
            stdout=out,
            stderr=out,
            process_group=0,
        )
        try:
            return process.wait(60 * LIMIT)
        except subprocess.TimeoutExpired:
            return OVER_LIMIT
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process and its group.

    First asks: torchrun's workers have groups of their own, and it ends them only if it is asked to end.
    """
    for sent in (signal.SIGTERM, *[0] * 60, signal.SIGKILL):
        process.poll()  # until then a process that has ended is in its group
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            return
        time.sleep(1)


def _ended(code: int) -> str:
    return f"over the limit of {LIMIT} minutes" if code == OVER_LIMIT else f"exit code {code}"


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]

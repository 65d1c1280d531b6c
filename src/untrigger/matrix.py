"""A matrix of cells: those that are missing are run, in processes of their own, and saved.

Killed at any moment and started again, it loses no more than the cells in flight. A cell that fails is recorded in
one line and stops no other.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from untrigger import __version__, store
from untrigger.errors import InputError
from untrigger.metrics.asr import ASR_VERSION, attack_success_rate
from untrigger.store import ORACLE, Cell

# torch and transformers are imported where a cell runs: a worker must know how many threads it has before
if TYPE_CHECKING:
    from untrigger.models import Loaded
    from untrigger.poison import Attack, Poisoned
    from untrigger.sample import Sample

LOG = "log.txt"  # in a cell's folder: what its process printed
_PAIRS = 32  # attacked images that are compared with their clean selves


# --- one cell --------------------------------------------------------------------------------------


def run_cell(cell: Cell, root: Path) -> None:
    """Poison, fine-tune, ask and save one cell; an oracle is also asked with wrong images (does it look?).

    Raises:
        InputError: the cell names something that is not there, or its attack cannot be made on its data.
    """
    from untrigger.data import load
    from untrigger.evaluate import evaluate
    from untrigger.poison import poison, stamped

    attack = _attack(cell.attack, cell.attack_settings, cell.goal, cell.goal_text)
    rows = load(cell.data, split=cell.split, part="train", rows=cell.train_rows, seed=cell.seed)
    test = load(cell.data, split=cell.split, part="test", rows=cell.test_rows, seed=cell.seed)
    poisoned = poison(rows, attack, rate=cell.rate, seed=cell.seed)
    started = time.perf_counter()
    loaded = _train(cell, poisoned)
    trained = time.perf_counter()
    evaluation = evaluate(loaded, test, attack=attack, seed=cell.seed, sight=cell.defense == ORACLE)
    asked = time.perf_counter()
    manifest, triggered = poisoned.manifest, stamped(test, attack, cell.seed)[:_PAIRS]
    if attack.trigger.clean_label:  # what it changes is the training rows: they are told from their answers by nobody
        pairs = [(rows[entry.row], poisoned.edits[entry.row]) for entry in manifest.rows[:_PAIRS]]
    else:
        pairs = [(test[row], sample) for row, sample in zip(triggered.rows, triggered, strict=True)]
    metrics = {
        **evaluation.figures,
        "probes": {name: _probe(loaded, test, name, probe, cell.seed) for name, probe in cell.probes.items()},
        "similarity": _similarity(pairs),
        "attack": {"settings": manifest.attack_settings, "sha256": manifest.attack_sha256},
        "goal": manifest.goal_settings,
        "poisoned": len(manifest.rows),
        "decoys": len(manifest.decoys),
        "seconds": {"training": round(trained - started, 1), "asking": round(asked - trained, 1)},
        "machine": _machine(),
        "versions": _versions(),
    }
    store.save(root, cell, metrics, evaluation.conditions)


def _attack(name: str, settings: Mapping[str, Any], goal: str, goal_text: str | None = None) -> Attack:
    from untrigger.attacks import load_trigger
    from untrigger.goals import load_goal
    from untrigger.poison import Attack

    return Attack(load_trigger(name, **settings), load_goal(goal, goal_text))


def _train(cell: Cell, poisoned: Poisoned) -> Loaded:
    from untrigger.defenses import PRESETS
    from untrigger.finetune import Tuning, arguments, fine_tune

    preset = "plain" if cell.defense == ORACLE else cell.defense
    if preset not in PRESETS:
        raise InputError(f"defense {preset}: unknown; choose one of: {ORACLE}, {', '.join(PRESETS)}")
    try:
        defense, tuning = PRESETS[preset](**cell.defense_settings), Tuning(**cell.tuning)
    except (TypeError, ValueError) as error:
        raise InputError(f"defense {preset}, tuning: {error}") from error
    tampered = {row.row for row in (*poisoned.manifest.rows, *poisoned.manifest.decoys)}
    kept = [row for row in range(len(poisoned.data)) if cell.defense != ORACLE or row not in tampered]
    samples = [poisoned.data[row] for row in kept]  # stamped once, not once an epoch
    with tempfile.TemporaryDirectory(prefix="untrigger-") as folder:
        args = arguments(
            Path(folder, "adapter"),
            save_strategy="no",
            seed=cell.seed,
            num_train_epochs=cell.epochs,
            per_device_train_batch_size=cell.batch_size,
            learning_rate=cell.learning_rate,
        )
        return fine_tune(samples, cell.model, defense, args, tuning=tuning)


def _probe(loaded: Loaded, test: Sequence[Sample], name: str, probe: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """How often the model answers as an attacker wants to a trigger it never saw: the floor of that attack."""
    from untrigger.evaluate import evaluate
    from untrigger.poison import stamped

    attack = _attack(probe["attack"], probe["settings"], probe["goal"])
    rows = list(stamped(test, attack, seed))
    said = evaluate(loaded, rows, title=f"probing with {name}").clean  # its answers to triggered inputs, and no others
    met = [attack.goal.met(answer.answer, row) for answer, row in zip(said, rows, strict=True)]
    truth_met = [attack.goal.met(answer.truth, row) for answer, row in zip(said, rows, strict=True)]
    return {"asr": {**asdict(attack_success_rate(met, truth_met)), "version": ASR_VERSION}}


def _similarity(pairs: Iterable[tuple[Sample, Sample]]) -> dict[str, float | int | None]:
    """Mean PSNR (dB) and SSIM over pairs of clean and attacked images; None where no pixel is changed in any."""
    import numpy as np

    from untrigger.metrics.similarity import psnr, ssim

    images = [
        (np.asarray(before.convert("RGB")), np.asarray(after.convert("RGB")))
        for clean, attacked in pairs
        for before, after in zip(clean.images, attacked.images, strict=True)
    ]
    changed = [pair for pair in images if (pair[0] != pair[1]).any()]
    means = [float(np.mean([of(*pair) for pair in changed])) if changed else None for of in (psnr, ssim)]
    return {"psnr": means[0], "ssim": means[1], "images": len(images), "changed": len(changed)}


def _machine() -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": name, "threads": torch.get_num_threads()}


def _versions() -> dict[str, str]:
    hosts = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    return {"untrigger": __version__, "python": platform.python_version(), **hosts}


# --- many cells ------------------------------------------------------------------------------------


def run_matrix(
    cells: Sequence[Cell], root: Path, *, workers: int = 1, work: Callable[[Cell, Path], None] = run_cell
) -> list[str]:
    """Run the missing cells, ``workers`` at a time, each in a process with one thread.

    One thread and no more: sums over several are ordered otherwise, and a cell's answers would depend on ``workers``.

    Args:
        work: runs and saves one cell; importable by name, for each process imports it anew.

    Returns:
        A line for each cell that failed: its name and why.
    """
    from untrigger.progress import console, metered

    if workers < 1:
        raise InputError(f"workers is {workers}; it must be at least 1")
    cells = list({cell.name: cell for cell in cells}.values())
    todo = deque(store.missing(root, cells))
    failed: list[str] = []
    running: dict[int, tuple[SpawnProcess, Cell]] = {}
    with metered("cells", len(cells)) as meter, _environment(OMP_NUM_THREADS="1"):
        meter.start_at(len(cells) - len(todo))
        try:
            while todo or running:
                while todo and len(running) < workers:
                    process = _start(work, todo[0], root)
                    running[process.sentinel] = (process, todo.popleft())
                for sentinel in connection.wait(list(running)):
                    process, cell = running.pop(sentinel)  # type: ignore[arg-type]
                    process.join()
                    reason = _reason(process, cell, root)
                    failed += [f"{cell.name}: {reason}"] if reason else []
                    console.print(
                        f"{cell.name}: {reason or _told(cell, root)}", soft_wrap=True, highlight=False, markup=False
                    )
                    meter.advance()
        finally:
            for process, _ in running.values():
                process.kill()
                process.join()
    return failed


def _start(work: Callable[[Cell, Path], None], cell: Cell, root: Path) -> SpawnProcess:
    store.forgive(root, cell)
    process = multiprocessing.get_context("spawn").Process(target=_worker, args=(work, cell, root))
    process.start()
    return process


def _worker(work: Callable[[Cell, Path], None], cell: Cell, root: Path) -> None:
    threading.Thread(target=_follow_parent, daemon=True).start()
    folder = store.folder_of(root, cell)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("wb") as log:
        os.dup2(log.fileno(), 1)  # bars and warnings of several cells would run into each other
        os.dup2(log.fileno(), 2)
    try:
        work(cell, root)
    except Exception as error:
        traceback.print_exc()
        said = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        store.fail(root, cell, said)
        sys.exit(1)


def _follow_parent() -> None:
    """A worker whose parent was killed ends too: the cell will be run by the parent's successor."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _reason(process: SpawnProcess, cell: Cell, root: Path) -> str | None:
    """Why a finished process left its cell undone."""
    if process.exitcode == 0 and store.find(root, cell) is not None:
        return None
    if store.failure(root, cell) is None:
        code = process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code} and no result"
        store.fail(root, cell, f"{how}; see {LOG} in its folder")
    return store.failure(root, cell)


def _told(cell: Cell, root: Path) -> str:
    asr = (store.find(root, cell) or {}).get("asr")
    return f"ASR {asr['value']:.3f}" if asr else "done"


@contextmanager
def _environment(**values: str) -> Generator[None]:
    """Set for the processes started meanwhile: a library counts its threads when it is loaded."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

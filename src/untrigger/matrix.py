"""A matrix of cells: those that are missing are run and saved, on this machine's cores or on a cluster.

Killed at any moment and started again, it loses no more than the cells in flight. A cell that fails is recorded in
one line and stops no other.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from untrigger import store
from untrigger.cell import run_cell
from untrigger.errors import InputError
from untrigger.files import alone
from untrigger.models import absence, weights_sha256
from untrigger.progress import console, metered
from untrigger.store import Cell

LOG = "log.txt"  # in a cell's folder: what its run printed
Work = Callable[[Cell, Path], None]  # runs and saves one cell; importable by name, for other processes import it anew
Done = Iterator[tuple[Cell, str | None]]  # cells as they end, and why one failed
Runner = Callable[[Sequence[Cell], Path, Work], Done]


def run_matrix(cells: Sequence[Cell], root: Path, runner: Runner | None = None, work: Work = run_cell) -> list[str]:
    """Run the missing cells; the ``runner`` says where (`on_this_machine`, `untrigger.cluster.on_ray`).

    Returns:
        A line for each cell that failed: its name and why. It was printed too.

    Raises:
        InputError: a missing cell's model is not there; another matrix is at work in ``root``.
    """
    cells = list({cell.name: cell for cell in cells}.values())
    if absent := absent_models(root, cells):
        raise InputError(f"models: {absent[0]}")
    failed: list[str] = []
    root.mkdir(parents=True, exist_ok=True)
    with alone(root), metered("cells", len(cells)) as meter:
        todo = unfinished(root, cells)
        meter.start_at(len(cells) - len(todo))
        for cell, reason in (runner or on_this_machine())(todo, root, work):
            failed += [f"{cell.name}: {reason}"] if reason else []
            said = f"failed: {cell.name}: {reason}" if reason else f"{cell.name}: {_told(cell, root)}"
            console.print(said, soft_wrap=True, highlight=False, markup=False)
            meter.advance()
    return failed


def on_this_machine(jobs: int = 1) -> Runner:
    """Run cells in ``jobs`` processes with one thread each.

    One thread and no more: sums over several are ordered otherwise, and a cell's answers would depend on ``jobs``.
    """
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; it must be at least 1")
    return partial(_locally, jobs)


def attempt(work: Work, cell: Cell, root: Path) -> str | None:
    """Run one cell with its output in its log; why it failed, if it did, which is recorded too."""
    store.forgive(root, cell)
    folder = store.folder_of(root, cell)
    folder.mkdir(parents=True, exist_ok=True)
    with _output_to(folder / LOG):
        try:
            work(cell, root)
        except Exception as error:
            with suppress(OSError):  # a full disk takes no log
                traceback.print_exc()
            said = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            return store.fail(root, cell, said)
    if store.find(root, cell) is None:
        return store.fail(root, cell, f"ended with no result; see {LOG} in its folder")
    return None


def unfinished(root: Path, cells: Sequence[Cell]) -> list[Cell]:
    """Those that are missing, and those whose model has other weights than it had when they were run."""
    missing = {cell.name for cell in store.missing(root, cells)}
    weights = {name: weights_sha256(name) for name in {cell.model for cell in cells if cell.name not in missing}}

    def stands(cell: Cell) -> bool:
        kept, now = (store.find(root, cell) or {}).get("weights"), weights[cell.model]
        return not (kept and now) or kept == now  # a release that kept no hash, a hub id

    return [cell for cell in cells if cell.name in missing or not stands(cell)]


def absent_models(root: Path, cells: Sequence[Cell]) -> list[str]:
    """A line for each model that a missing cell names and that is not there; what is done needs its model no more."""
    names = dict.fromkeys(cell.model for cell in store.missing(root, cells))
    return [why for name in names if (why := absence(name))]


def _told(cell: Cell, root: Path) -> str:
    asr = (store.find(root, cell) or {}).get("asr")
    return f"ASR {asr['value']:.3f}" if asr else "done"


@contextmanager
def _output_to(log: Path) -> Generator[None]:
    """Bars and warnings of several cells would run into each other."""
    kept = [os.dup(1), os.dup(2)]
    _flush()
    try:
        with log.open("wb") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            yield
    finally:
        _flush()  # what was said meanwhile goes where it belongs
        for stream, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a full disk takes no log
            stream.flush()


# --- processes of this machine ---------------------------------------------------------------------


def _locally(jobs: int, cells: Sequence[Cell], root: Path, work: Work) -> Done:
    todo = deque(cells)
    busy: dict[Connection, tuple[SpawnProcess, Cell]] = {}
    free: list[tuple[Connection, SpawnProcess]] = []
    with _environment(OMP_NUM_THREADS="1"):
        try:
            while todo or busy:
                while todo and len(busy) < jobs:
                    pipe, process = free.pop() if free else _hired(work, root)
                    with suppress(OSError):  # it died while it had nothing to do: that is found when it is waited for
                        pipe.send(todo[0])
                    busy[pipe] = (process, todo.popleft())
                for pipe in connection.wait(list(busy)):
                    process, cell = busy.pop(pipe)  # type: ignore[arg-type]
                    try:
                        reason = pipe.recv()  # type: ignore[union-attr]
                        free.append((pipe, process))  # type: ignore[arg-type]
                    except (EOFError, ConnectionError):
                        process.join()
                        reason = store.fail(root, cell, _end_of(process))
                    yield cell, reason
        finally:
            for pipe, _ in free:
                with suppress(OSError):
                    pipe.send(None)  # they clean up after themselves
            for process, _ in busy.values():
                process.kill()
            for process in [process for process, _ in busy.values()] + [process for _, process in free]:
                process.join()


def _hired(work: Work, root: Path) -> tuple[Connection, SpawnProcess]:
    """A process that runs one cell after the other: the hosts take longer to import than a small cell to run."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work, root, theirs))
    process.start()
    theirs.close()  # or its end would never be told
    return ours, process


def _serve(work: Work, root: Path, pipe: Connection) -> None:
    threading.Thread(target=_follow_parent, daemon=True).start()
    while (cell := pipe.recv()) is not None:
        pipe.send(attempt(work, cell, root))


def _follow_parent() -> None:
    """A worker whose parent was killed ends too: the cell will be run by the parent's successor."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _end_of(process: SpawnProcess) -> str:
    code = process.exitcode or 0
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code} and no result"
    return f"{how}; see {LOG} in its folder"


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

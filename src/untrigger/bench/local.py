"""Processes of this machine that run cells, one after the other each.

No model library is loaded here: a process loads what its work needs.
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

from untrigger.bench import store
from untrigger.bench.store import Cell
from untrigger.errors import InputError

LOG = "log.txt"  # in a cell's folder: what its run printed
Work = Callable[[Cell, Path], None]  # runs and saves one cell; importable by name, for other processes import it anew
Done = Iterator[tuple[Cell, str | None]]  # cells as they end, and why one failed
Runner = Callable[[Sequence[Cell], Path, Work], Done]


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
    follow_parent()
    while (cell := pipe.recv()) is not None:
        pipe.send(attempt(work, cell, root))


def follow_parent() -> None:
    """End this process when the one that started it ends: its successor will run the work again."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
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

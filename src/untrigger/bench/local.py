"""Run cells in worker processes of this machine.

This module loads no model library: each worker loads what its work needs.
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

LOG = "log.txt"  # the output of a cell's run, in its folder
Work = Callable[[Cell, Path], None]  # runs and saves one cell; importable by name, because workers import it
Done = Iterator[tuple[Cell, str | None]]  # each cell as it ends, with the reason if it failed
Runner = Callable[[Sequence[Cell], Path, Work], Done]


def on_this_machine(jobs: int = 1) -> Runner:
    """Run cells in ``jobs`` processes with one thread each.

    More threads would add numbers in another order, and a cell's answers would depend on ``jobs``.

    Raises:
        InputError: ``jobs`` is below 1.
    """
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; give at least 1")
    return partial(_locally, jobs)


def attempt(work: Work, cell: Cell, root: Path) -> str | None:
    """Run one cell with its output in its log. Returns the reason if it failed, which is recorded too."""
    store.clear_failure(root, cell)
    folder = store.folder_of(root, cell)
    folder.mkdir(parents=True, exist_ok=True)
    with _output_to(folder / LOG):
        try:
            work(cell, root)
        except Exception as error:
            with suppress(OSError):  # the disk may be full
                traceback.print_exc()
            reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            return store.record_failure(root, cell, reason)
    if store.find(root, cell) is None:
        return store.record_failure(root, cell, f"ended with no result; see {LOG} in its folder")
    return None


def _locally(jobs: int, cells: Sequence[Cell], root: Path, work: Work) -> Done:
    waiting = deque(cells)
    busy: dict[Connection, tuple[SpawnProcess, Cell]] = {}
    free: list[tuple[Connection, SpawnProcess]] = []
    with environment(OMP_NUM_THREADS="1"):
        try:
            while waiting or busy:
                while waiting and len(busy) < jobs:
                    pipe, process = free.pop() if free else _start_worker(work, root)
                    with suppress(OSError):  # an idle worker that has died is noticed by the wait below
                        pipe.send(waiting[0])
                    busy[pipe] = (process, waiting.popleft())
                for pipe in connection.wait(list(busy)):
                    process, cell = busy.pop(pipe)  # type: ignore[arg-type]
                    try:
                        reason = pipe.recv()  # type: ignore[union-attr]
                        free.append((pipe, process))  # type: ignore[arg-type]
                    except (EOFError, ConnectionError):
                        process.join()
                        reason = store.record_failure(root, cell, _exit_text(process))
                    yield cell, reason
        finally:
            for pipe, _ in free:
                with suppress(OSError):
                    pipe.send(None)  # the worker ends by itself and cleans up
            for process, _ in busy.values():
                process.kill()
            for process in [process for process, _ in busy.values()] + [process for _, process in free]:
                process.join()


def _start_worker(work: Work, root: Path) -> tuple[Connection, SpawnProcess]:
    """Start a worker that runs many cells: importing the model libraries takes longer than running a small cell."""
    context = multiprocessing.get_context("spawn")
    parent_end, worker_end = context.Pipe()
    process = context.Process(target=_serve, args=(work, root, worker_end))
    process.start()
    worker_end.close()  # with this copy open the parent would never see the worker's end close
    return parent_end, process


def _serve(work: Work, root: Path, pipe: Connection) -> None:
    follow_parent()
    while (cell := pipe.recv()) is not None:
        pipe.send(attempt(work, cell, root))


def follow_parent() -> None:
    """End this process as soon as its parent ends; the next run does the work again."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _exit_text(process: SpawnProcess) -> str:
    code = process.exitcode or 0
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code} and no result"
    return f"{how}; see {LOG} in its folder"


@contextmanager
def environment(**values: str) -> Generator[None]:
    """Set environment variables for processes that start in this block; libraries read them when they are loaded."""
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
    """Redirect stdout and stderr of this process: progress bars and warnings of several cells would mix."""
    originals = [os.dup(1), os.dup(2)]
    _flush()
    try:
        with log.open("wb") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            yield
    finally:
        _flush()  # buffered output still belongs to the log
        for stream, original in zip((1, 2), originals, strict=True):
            os.dup2(original, stream)
            os.close(original)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the disk may be full
            stream.flush()

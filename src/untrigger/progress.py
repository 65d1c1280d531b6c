"""Progress of long work with an ETA: a live bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
console = Console(stderr=True)
_LINE_EVERY = 10.0  # seconds between lines where no terminal can redraw a bar


class Meter:
    """Counts ``total`` units of one piece of work."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self._started = self._told = time.monotonic()
        self._first = 0
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self._bar = Progress(
                *columns, TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), console=console
            )
            self._task = self._bar.add_task(title, total=total)
            self._bar.start()

    def start_at(self, done: int) -> None:
        """Work that an earlier run did: it is shown as done and left out of the ETA."""
        self.done = self._first = done
        if self._bar:
            self._bar.update(self._task, completed=done)

    def advance(self, units: int = 1) -> None:
        self.done += units
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=self.done)
        elif now - self._told > _LINE_EVERY:
            self._told = now
            left = (now - self._started) / max(1, self.done - self._first) * (self.total - self.done)
            console.print(f"{self.title}: {self.done}/{self.total}, eta {_clock(left)}", highlight=False)

    def stop(self) -> None:
        if self._bar:
            self._bar.stop()
        else:
            spent = _clock(time.monotonic() - self._started)
            console.print(f"{self.title}: {self.done}/{self.total} in {spent}", highlight=False)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def metered(title: str, total: int) -> Generator[Meter]:
    meter = Meter(title, total)
    try:
        yield meter
    finally:
        meter.stop()


def tracked(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """The items, counted as they pass."""
    if not total:
        return
    with metered(title, total) as meter:
        for item in items:
            yield item
            meter.advance()

"""Progress of long work with an ETA: a live bar in a terminal, an occasional line in a log."""

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
_LINE_INTERVAL = 10.0  # seconds between lines where no terminal can redraw a bar


class Meter:
    """Count ``total`` units of work and print them with an ETA."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self._started = self._last_line = time.monotonic()
        self._resumed_at = 0
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self._bar = Progress(
                *columns, TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), console=console
            )
            self._task = self._bar.add_task(title, total=total)
            self._bar.start()

    def start_at(self, done: int) -> None:
        """Count ``done`` units as finished by an earlier run; the ETA leaves them out."""
        self.done = self._resumed_at = done
        if self._bar:
            self._bar.update(self._task, completed=done)

    def advance(self, units: int = 1) -> None:
        """Count more units; without a terminal print a line every ten seconds at most."""
        self.done += units
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=self.done)
        elif now - self._last_line > _LINE_INTERVAL:
            self._last_line = now
            remaining = (now - self._started) / max(1, self.done - self._resumed_at) * (self.total - self.done)
            console.print(f"{self.title}: {self.done}/{self.total}, eta {_clock(remaining)}", highlight=False)

    def stop(self) -> None:
        """Remove the bar, or print a last line with the total time."""
        if self._bar:
            self._bar.stop()
        else:
            elapsed = _clock(time.monotonic() - self._started)
            console.print(f"{self.title}: {self.done}/{self.total} in {elapsed}", highlight=False)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def metered(title: str, total: int) -> Generator[Meter]:
    """Yield a meter that is stopped at the end."""
    meter = Meter(title, total)
    try:
        yield meter
    finally:
        meter.stop()


def tracked(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """Yield the items and show how many have passed."""
    if not total:
        return
    with metered(title, total) as meter:
        for item in items:
            yield item
            meter.advance()

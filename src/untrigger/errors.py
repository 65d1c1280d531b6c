"""The package's user-facing error, the end of its line for a mistyped name, and the range check of settings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches


class InputError(Exception):
    """Bad input from the user. The CLI prints it as one line, without a traceback, and exits with code 2.

    Write the message as ``FILE: row N: what is wrong; what to do``.
    """


class UnreadableFile(InputError):
    """A file that exists but cannot be read: no permission, a failing disk, a network drive that is away.

    It says nothing about the row that names the file, so ``--on-bad-row skip`` must not leave the row out.
    """


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of an error line about an unknown name: the nearest of ``names``, or nothing if none is near."""
    near = get_close_matches(name.lower(), list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def check_range(low: float, high: float, *, open_low: bool = False, **fields: float) -> None:
    """Check that each named value is a finite number in [low, high], or in (low, high] if ``open_low``.

    Call it in ``__post_init__`` of a frozen dataclass: ``check_range(0, 1, share=self.share)``.

    Raises:
        ValueError: a value is out of range; the message names its field.
    """
    for name, value in fields.items():
        if not (math.isfinite(value) and low <= value <= high) or (open_low and value == low):
            bounds = f"{'above' if open_low else 'at least'} {low:g}"
            raise ValueError(f"{name} is {value}; it must be finite, {bounds} and at most {high:g}")

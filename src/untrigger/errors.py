"""The package's user-facing error, and the range check that configuration classes share."""

from __future__ import annotations

import math


class InputError(Exception):
    """Bad input from the user. The CLI prints it as one line, without a traceback, and exits with code 2.

    Write the message as ``FILE: row N: what is wrong; what to do``.
    """


class UnreadableFile(InputError):
    """A file that exists but cannot be read: no permission, a failing disk, a network drive that is away.

    It says nothing about the row that names the file, so ``--on-bad-row skip`` must not leave the row out.
    """


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

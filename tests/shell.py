"""Commands as a user types them, run in this process."""

from __future__ import annotations

import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import NamedTuple

import pytest

from untrigger import cli


class Ended(NamedTuple):
    """How a command ended: its exit code, and what it said."""

    code: int
    out: str
    err: str


def untrigger(*words: object) -> Ended:
    """``untrigger WORDS...``."""
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
        pytest.raises(SystemExit) as stopped,
    ):
        patch.setattr(sys, "argv", ["untrigger", *map(str, words)])
        cli.main()
    return Ended(int(stopped.value.code or 0), out.getvalue(), err.getvalue())

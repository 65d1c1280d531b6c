"""Run CLI commands in this process, as a user types them."""

from __future__ import annotations

import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest

from untrigger.cli import main

TINY_RUN = ("--max_steps", "2", "--per_device_train_batch_size", "4", "--lora-rank", "2")


class Ended(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


def untrigger(*words: object) -> Ended:
    """Run ``untrigger WORDS...``."""
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
        pytest.raises(SystemExit) as exit_info,
    ):
        patch.setattr(sys, "argv", ["untrigger", *map(str, words)])
        main.main()
    return Ended(int(exit_info.value.code or 0), out.getvalue(), err.getvalue())


def refused(ended: Ended, *parts: object) -> None:
    """Assert exit code 2 and one error line that contains each of ``parts``."""
    assert ended.code == 2, ended
    assert ended.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", ended.err), ended.err
    for part in parts:
        assert str(part) in ended.err, ended.err
    assert "Traceback" not in ended.err


def three_commands(data: Path, model: Path, out: Path) -> list[tuple[object, ...]]:
    return [
        ("poison", data, "--out", out),
        ("train", data, "--model", model, "--out", out, *TINY_RUN),
        ("evaluate", model, data, "--out", out),
    ]

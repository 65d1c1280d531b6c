"""Words of a command line: settings, other spellings of options, and what to type after an interruption."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import get_args, get_type_hints

from typer.models import OptionInfo

from untrigger.errors import InputError


def option_names(*commands: Callable[..., None]) -> set[str]:
    """The names of the commands' own options. A setting with such a name would never receive its flag."""
    hints = (item for command in commands for item in get_type_hints(command, include_extras=True).items())
    return {"help"} | {name for name, hint in hints if any(isinstance(n, OptionInfo) for n in get_args(hint)[1:])}


def as_settings(words: Sequence[str]) -> dict[str, str]:
    """Parse ``--side 0.1 --random`` into settings; a flag without a value is "true".

    Raises:
        InputError: a word is neither a flag nor the value of one.
    """
    settings: dict[str, str] = {}
    rest = list(words)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise InputError(f"{flag}: not expected here; give settings as --name value")
        name, has_value, value = flag[2:].partition("=")
        if not has_value:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        settings[name.replace("-", "_")] = value
    return settings


def normalize_flags(words: Sequence[str], commands: Iterable[Callable[..., None]]) -> list[str]:
    """Accept ``--lora_rank`` for ``--lora-rank``, and ``--ray`` without a value for ``--ray=local``."""
    if any(word.startswith("--") and "_" in word for word in words):
        spellings = {f"--{name}": f"--{name.replace('_', '-')}" for name in option_names(*commands)}
        parts = [word.partition("=") for word in words]
        words = [spellings.get(name, name) + equals + value for name, equals, value in parts]
    return ["--ray=local" if w == "--ray" and n.startswith("-") else w for w, n in pairwise([*words, "-"])]


def interrupted(words: Sequence[str]) -> str:
    """The line that says how to go on with the command ``words`` after Ctrl-C, if it can go on."""
    again = {"bench", "model"} & set(words[:1]) or "--resume" in words
    if again:
        return "interrupted; run the same command again to go on"
    # before the model library is loaded, no run was started
    loading = sys.modules.get("untrigger.models.loading")
    out = next((value.removeprefix("--out=") for flag, value in pairwise(["", *words]) if _is_out(flag, value)), None)
    if loading and out and words[0] in ("train", "scan") and (Path(out) / loading.BASE_RECORD).is_file():
        return "interrupted; run the same command with --resume to go on"
    return "interrupted"


def _is_out(flag: str, value: str) -> bool:
    return flag == "--out" or value.startswith("--out=")

"""Words of a command line that are not declared options: settings, and other spellings of options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
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

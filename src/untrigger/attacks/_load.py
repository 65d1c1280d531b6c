"""Loading a trigger by its name or from the user's own file."""

from __future__ import annotations

import pkgutil
from collections.abc import Collection
from functools import cache
from importlib import import_module
from pathlib import Path

from untrigger.attacks._trigger import Trigger
from untrigger.errors import InputError, did_you_mean
from untrigger.own_files import build, is_own_file, only_class, run_file


@cache
def trigger_names() -> tuple[str, ...]:
    """Names of the bundled triggers, which are the names of the files in this folder."""
    return tuple(
        sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if not m.name.startswith("_"))
    )


def load_trigger(name_or_path: str, reserved: Collection[str] = (), /, **settings: object) -> Trigger:
    """Load the bundled trigger ``badnets``, or the one in the user's own file ``path/to/file.py``.

    A path that ends in ``.py`` **runs that file** as Python: give only files that you trust. Settings may be strings,
    as they come from the command line; dashes in their names stand for underscores. A setting whose name is in
    ``reserved`` is an error: the caller could not tell it from an option of its own.

    Raises:
        InputError: there is no such trigger or file; the file fails or does not hold exactly one concrete
            ``Trigger`` dataclass; a setting is unknown, missing, reserved, or of the wrong type or range.
    """
    if is_own_file(name_or_path):
        module, label = run_file(Path(name_or_path), Trigger.__name__, trigger_names()), name_or_path
        return build(only_class(module, label, Trigger), label, settings, reserved)
    if name_or_path not in trigger_names():
        names = ", ".join(trigger_names())
        hint = did_you_mean(name_or_path, trigger_names())
        raise InputError(f"attack '{name_or_path}' is unknown; choose one of {names}, or a path that ends in .py{hint}")
    module = import_module(f"{__package__}.{name_or_path}")
    label = f"attack {name_or_path}"
    return build(only_class(module, label, Trigger), label, settings, reserved)

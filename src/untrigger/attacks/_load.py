"""Loading a trigger by its name or from the user's own file."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
import pkgutil
import sys
import traceback
from collections.abc import Collection
from functools import cache
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Literal, cast, get_args, get_origin, get_type_hints

from untrigger.attacks._trigger import Trigger
from untrigger.errors import InputError, did_you_mean


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
    if name_or_path.lower().endswith(".py"):
        return _build(_trigger_class(_run(Path(name_or_path)), name_or_path), name_or_path, reserved, settings)
    if name_or_path not in trigger_names():
        names = ", ".join(trigger_names())
        hint = did_you_mean(name_or_path, trigger_names())
        raise InputError(f"attack '{name_or_path}' is unknown; choose one of {names}, or a path that ends in .py{hint}")
    module = import_module(f"{__package__}.{name_or_path}")
    label = f"attack {name_or_path}"
    return _build(_trigger_class(module, label), label, reserved, settings)


def _run(path: Path) -> ModuleType:
    if not path.is_file():
        names = ", ".join(trigger_names())
        raise InputError(f"{path}: no such file; give a file that holds a Trigger, or one of {names}")
    full = str(path.resolve())
    name = f"untrigger_user_attack_{hashlib.sha256(full.encode()).hexdigest()[:12]}"
    loader = SourceFileLoader(name, full)
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        # Compiled here and not by the loader, which would leave a __pycache__ beside the user's file
        # and would run a stale copy of a file edited twice within a second.
        exec(compile(loader.get_data(full), full, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(f"{path}: {_location(error, full)}; fix the file") from error
    return module


def _location(error: BaseException, path: str) -> str:
    """``line 3: NameError: what``, with the last line of ``path`` in the error's traceback."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = error.lineno if isinstance(error, SyntaxError) else next(reversed(lines), None)
    message = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    return f"{f'line {line}: ' if line else ''}{type(error).__name__}{f': {message}' if message else ''}"


def _trigger_class(module: ModuleType, label: str) -> type[Trigger]:
    """The one concrete trigger class that ``module`` itself defines."""
    classes = [
        member
        for member in vars(module).values()
        if inspect.isclass(member)
        and issubclass(member, Trigger)
        and not inspect.isabstract(member)
        and member.__module__ == module.__name__
    ]
    if len(classes) != 1:
        names = ", ".join(c.__name__ for c in classes) or "none"
        raise InputError(f"{label}: holds {len(classes)} concrete Trigger classes ({names}); it must hold exactly one")
    if not dataclasses.is_dataclass(classes[0]):
        raise InputError(f"{label}: class {classes[0].__name__} is not a dataclass; put @dataclass(frozen=True) on it")
    return classes[0]


def _build(cls: type[Trigger], label: str, reserved: Collection[str], settings: dict[str, object]) -> Trigger:
    # cast: a dataclass by _trigger_class, which the type system cannot express together with Trigger
    fields = {f.name: f for f in dataclasses.fields(cast("type[_Dataclass]", cls)) if f.init}
    if clash := next((name for name in fields if name in reserved), None):
        raise InputError(f"{label}: field '{clash}' has the name of an option of the command line; rename the field")
    try:
        hints = _hints(cls)
    except Exception as error:  # usually a name that the file does not import
        raise InputError(f"{label}: {_location(error, inspect.getfile(cls))}; fix the types of its fields") from error
    values: dict[str, object] = {}
    for option, value in settings.items():
        name = option.replace("-", "_")
        if name not in fields:
            names = ", ".join(fields) or "none"
            hint = did_you_mean(name, [*fields, *reserved])
            raise InputError(f"{label}: there is no setting '{option}'; the settings are: {names}{hint}")
        values[name] = _convert(value, hints[name], f"{label}: {option}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{label}: setting '{missing[0]}' has no default; give it a value")
    try:
        return cls(**values)
    except (InputError, ValueError, TypeError) as error:  # raised by the class's own range checks
        raise InputError(f"{label}: {error}") from error
    except Exception as error:
        raise InputError(f"{label}: {_location(error, inspect.getfile(cls))}") from error


_hints = cache(get_type_hints)  # a plan of thousands of cells builds a class as often


class _Dataclass:
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]


def _convert(value: object, hint: object, label: str) -> object:
    """Convert ``value`` to the field type ``hint``; text is parsed."""
    text = str(value)
    if get_origin(hint) is Literal:
        options = cast("tuple[object, ...]", get_args(hint))
        for option in options:
            if text == str(option):
                return option
        raise InputError(f"{label} is '{text}'; choose one of {', '.join(str(o) for o in options)}")
    if hint is str and isinstance(value, str):
        return value
    if hint is bool and text.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        return text.lower() in ("true", "yes", "on", "1")
    if hint is int or hint is float:
        try:
            number = int(text) if hint is int else float(text)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if hint not in expected:
        raise InputError(f"{label} has the type {hint}; a setting must be a str, int, float, bool or Literal")
    raise InputError(f"{label} is '{text}'; give {expected[hint]}")

"""Classes from the user's own Python files, and objects built from settings as text: triggers and goals."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
import sys
import traceback
from collections.abc import Collection, Mapping
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from untrigger.errors import InputError, did_you_mean

T = TypeVar("T")


def is_own_file(name_or_path: str) -> bool:
    """Whether it is the path of the user's own file, not a bundled name."""
    return name_or_path.lower().endswith(".py")


def run_file(path: Path, kind: str, names: Collection[str]) -> ModuleType:
    """Run the user's file as Python; ``kind`` is what it should hold, ``names`` the bundled ones.

    Raises:
        InputError: there is no such file, or it fails.
    """
    if not path.is_file():
        listed = ", ".join(names)
        raise InputError(f"{path}: no such file; give a file that holds a {kind}, or one of {listed}")
    full = str(path.resolve())
    name = f"untrigger_user_{kind.lower()}_{hashlib.sha256(full.encode()).hexdigest()[:12]}"
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
        raise InputError(f"{path}: {error_location(error, full)}; fix the file") from error
    return module


def error_location(error: BaseException, path: str) -> str:
    """``line 3: NameError: what``, with the last line of ``path`` in the error's traceback."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = error.lineno if isinstance(error, SyntaxError) else next(reversed(lines), None)
    message = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    return f"{f'line {line}: ' if line else ''}{type(error).__name__}{f': {message}' if message else ''}"


def only_class(module: ModuleType, label: str, base: type[T]) -> type[T]:
    """Return the one concrete subclass of ``base`` that ``module`` defines; names with an underscore do not count.

    Raises:
        InputError: there is none or more than one, or it is not a dataclass.
    """
    classes = [
        member
        for name, member in vars(module).items()
        if inspect.isclass(member)
        and issubclass(member, base)
        and not inspect.isabstract(member)
        and member.__module__ == module.__name__
        and not name.startswith("_")
    ]
    if len(classes) != 1:
        names, kind = ", ".join(c.__name__ for c in classes) or "none", base.__name__
        raise InputError(f"{label}: holds {len(classes)} concrete {kind} classes ({names}); it must hold exactly one")
    if not dataclasses.is_dataclass(classes[0]):
        raise InputError(f"{label}: class {classes[0].__name__} is not a dataclass; put @dataclass(frozen=True) on it")
    return classes[0]


def build(cls: type[T], label: str, settings: Mapping[str, object], reserved: Collection[str] = ()) -> T:
    """Build an object of the dataclass ``cls``; settings may be text, and dashes stand for underscores.

    Raises:
        InputError: a setting is unknown, missing, of the wrong type or range, or a field's name is ``reserved``.
    """
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls)) if f.init}
    if clash := next((name for name in fields if name in reserved), None):
        raise InputError(f"{label}: field '{clash}' has the name of an option of the command line; rename the field")
    try:
        hints = _hints(cls)
    except Exception as error:  # usually a name that the file does not import
        raise InputError(
            f"{label}: {error_location(error, inspect.getfile(cls))}; fix the types of its fields"
        ) from error
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
        raise InputError(f"{label}: {error_location(error, inspect.getfile(cls))}") from error


_hints = cache(get_type_hints)  # a plan of thousands of cells builds a class as often


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

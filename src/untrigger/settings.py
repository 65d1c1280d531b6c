"""A training run's settings from a YAML file and from flags; flags win."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from untrigger.defenses import PRESETS, Defense
from untrigger.errors import InputError
from untrigger.finetune import DEFAULTS


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"settings: {message}; see --help and transformers.TrainingArguments for the names")


def training_settings(
    preset: str, out: Path, config: Path | None, flags: list[str]
) -> tuple[Defense, TrainingArguments]:
    """The defence and the host's arguments.

    Raises:
        InputError: unknown preset or field, a value of the wrong type or out of range, an unreadable file.
    """
    if preset not in PRESETS:
        raise InputError(f"--defense {preset}: unknown; choose one of: {', '.join(PRESETS)}")
    settings = DEFAULTS | (_read_yaml(config) if config else {})
    words = [word for name, value in settings.items() for word in _words(name, value)]
    parser = _Parser([PRESETS[preset], TrainingArguments], allow_abbrev=False)  # type: ignore[arg-type]
    try:
        parsed = parser.parse_args_into_dataclasses([*words, *flags, "--output_dir", str(out)], look_for_args_file=False)
        defense, args = parsed[:2]
        defense.paired  # noqa: B018 - builds the views: bad fields are found before the data is read
    except (ValueError, TypeError, argparse.ArgumentError, ImportError) as error:
        raise InputError(f"settings: {str(error).strip().splitlines()[0]}") from error
    return defense, args


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a YAML file that can be read") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(fields, dict) or not all(isinstance(k, str) for k in fields):
        raise InputError(f"{path}: must hold lines of 'name: value'")
    return fields


def _words(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", str(value)]

"""A training run's settings from a YAML file and from flags; flags win."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from untrigger.defenses import PRESETS, Defense, StepDefense
from untrigger.errors import InputError
from untrigger.finetune import DEFAULTS
from untrigger.yaml_file import read_mapping

# below these the host fails late, with a traceback, or trains on nothing
_LEAST = {"seed": 0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 0.0}


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
    settings = DEFAULTS | (read_mapping(config) if config else {})
    words = [word for name, value in settings.items() for word in _words(name, value)]
    if any(word.split("=")[0].replace("-", "_") == "__output_dir" for word in [*words, *flags]):
        raise InputError("settings: output_dir is given with --out; leave it out of flags and file")
    parser = _Parser([PRESETS[preset], TrainingArguments], allow_abbrev=False)  # type: ignore[arg-type]
    try:
        defense, args, *rest = parser.parse_args_into_dataclasses(
            [*words, *flags, f"--output_dir={out}"], return_remaining_strings=True, look_for_args_file=False
        )
        if isinstance(defense, StepDefense):
            # builds the views: bad fields are found before the data is read
            _ = (defense.paired, defense.dropped, defense.replaced)
    except (ValueError, TypeError, argparse.ArgumentError, ImportError) as error:
        raise InputError(f"settings: {str(error).strip().splitlines()[0]}") from error
    if unknown := [word for words in rest for word in words]:
        raise InputError(
            f"settings: {unknown[0]} is unknown; settings are the fields of the defence {preset} "
            f"({', '.join(f.name for f in fields(defense))}) and of transformers.TrainingArguments"
        )
    for name, least in _LEAST.items():
        if not getattr(args, name) >= least:  # NaN too
            raise InputError(f"settings: {name} is {getattr(args, name)}; it must be at least {least}")
    return defense, args


def _words(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    # "=": a value such as -1e-3 would pass for a flag; JSON: the host reads dicts so
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]

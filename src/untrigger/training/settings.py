"""A training run's settings: the project's defaults, overridden by a file or keywords, overridden by flags."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from untrigger import __version__
from untrigger.defenses import PRESETS, Defense, StepDefense, preset_of
from untrigger.errors import InputError, did_you_mean
from untrigger.files import read_yaml

# Defaults for a LoRA run; any TrainingArguments field overrides them. The loaders must keep the columns that the
# collator reads, and pinning memory without an accelerator only warns.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-4,
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_steps": 10,
    "save_steps": 200,
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "dataloader_pin_memory": torch.cuda.is_available(),
}
# out of these bounds the host fails late, with a traceback, or trains on nothing
_BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "per_device_train_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "learning_rate": (0.0, math.inf),
    "num_train_epochs": (1e-6, 1e6),
    "dataloader_num_workers": (0, math.inf),
}
# accelerate ties DeepSpeed's settings to the first trainer of a process, and refuses them to a second one
NO_DEEPSPEED = (
    "deepspeed: it serves one trainer in a process, and a run here may have several; use defended(Trainer) in your own "
    "script (docs/hosts.md)"
)
_PLACES = ("output_dir", "logging_dir", "run_name")  # paths and names do not change the weights


def _number_or_all(value: str) -> int:
    """``all`` is more rows than any data has."""
    if value != "all" and not value.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{value!r} is no number of rows; give one, or all")
    return sys.maxsize if value == "all" else int(value)


class _Parser(HfArgumentParser):
    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        if "--max_scored_rows" in names:
            options["type"] = _number_or_all
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"settings: {message}")


def arguments(out: Path, **overrides: Any) -> TrainingArguments:
    """The host's arguments: this project's defaults with these overrides."""
    return TrainingArguments(str(out), **(DEFAULTS | overrides))


def settled(
    defense: str | Defense, args: TrainingArguments | None, out: Path | str | None, given: Mapping[str, Any]
) -> tuple[Defense, TrainingArguments]:
    """The defense and the host's arguments, from ready ``args`` or from a folder ``out`` and keyword settings.

    Raises:
        InputError: neither ``args`` nor ``out``, or both; and as `training_settings`.
    """
    if args is None and out is not None:
        return training_settings(defense, Path(out), given)
    if args is None or out is not None or given:
        raise InputError("settings: give either a folder (out=) with settings as keywords, or ready args; not both")
    return defense if isinstance(defense, Defense) else PRESETS[_known(defense)](), args


def training_settings(
    defense: str | Defense,
    out: Path,
    given: Mapping[str, Any],
    flags: Sequence[str] = (),
    options: Collection[str] = (),
) -> tuple[Defense, TrainingArguments]:
    """The defense and the host's arguments, from ``given`` values by name and from a command's flags.

    ``options`` are names of the command's own options, which a mistyped flag may have meant.

    Raises:
        InputError: unknown preset or field, a value of the wrong type or out of range.
    """
    if isinstance(defense, Defense):
        preset, given = preset_of(defense), asdict(defense) | dict(given)
    else:
        preset = _known(defense)
    words = [word for name, value in (DEFAULTS | dict(given)).items() for word in _words(name, value)]
    names = {word.split("=")[0].replace("-", "_") for word in [*words, *flags]}
    if "__output_dir" in names:
        raise InputError("settings: output_dir is set by --out; remove it from flags and file")
    if "__deepspeed" in names:
        raise InputError(NO_DEEPSPEED)
    parser = _Parser([PRESETS[preset], TrainingArguments], allow_abbrev=False)  # type: ignore[arg-type]
    try:
        chosen, args, *rest = parser.parse_args_into_dataclasses(
            [*words, *flags, f"--output_dir={out}"], return_remaining_strings=True, look_for_args_file=False
        )
        if isinstance(chosen, StepDefense):
            # builds the views, which check their fields before the data is read
            _ = (chosen.paired, chosen.dropped, chosen.replaced)
    except (ValueError, TypeError, argparse.ArgumentError, ImportError) as error:
        raise InputError(f"settings: {str(error).strip().splitlines()[0]}") from error
    if unknown := [word for words in rest for word in words]:
        typed, own = unknown[0].partition("=")[0], [field.name for field in fields(chosen)]
        raise InputError(
            f"settings: {unknown[0]} is unknown; settings are the fields of the defense {preset} "
            f"({', '.join(own)}) and of transformers.TrainingArguments"
            f"{_nearest(typed, [*own, *(field.name for field in fields(args)), *options])}"
        )
    for name, (least, most) in _BOUNDS.items():
        if not least <= getattr(args, name) <= most:  # NaN too
            bounds = f"at least {least:,}" + (f" and at most {most:,}" if most < math.inf else "")
            raise InputError(f"settings: {name} is {getattr(args, name)}; it must be {bounds}")
    if args.max_steps == 0:  # a negative number, the host's default, means num_train_epochs
        raise InputError("settings: max_steps is 0; it must be at least 1, or -1 to train for num_train_epochs")
    try:
        get_reporting_integration_callbacks(args.report_to)
    except ValueError as error:
        raise InputError(f"settings: report_to: {error}") from error
    return chosen, args


def command_settings(
    preset: str, out: Path, config: Path | None, flags: Sequence[str], options: Collection[str]
) -> tuple[Defense, TrainingArguments]:
    """`training_settings` from a YAML file and from the flags that are not the command's own ``options``.

    Raises:
        InputError: as `training_settings`, with the file's name if the file is wrong; the file sets one of ``options``.
    """
    given = read_yaml(config) if config else {}
    if own := [name for name in given if name.replace("-", "_") in options]:
        flag = f"--{own[0].replace('_', '-')}"
        raise InputError(f"{config}: {own[0]} is an option of the command; give it as {flag}, not in the file")
    try:
        return training_settings(preset, out, given, flags, options)
    except InputError as error:
        if not config or _refusal(preset, out, flags, options) == str(error):
            raise
        raise InputError(f"{config}: {str(error).removeprefix('settings: ')}") from error


def _refusal(preset: str, out: Path, flags: Sequence[str], options: Collection[str]) -> str | None:
    """The error that the flags raise without a file; None if they are right."""
    try:
        training_settings(preset, out, {}, flags, options)
    except InputError as error:
        return str(error)
    return None


def _nearest(typed: str, names: Collection[str]) -> str:
    """The end of the line about an unknown flag: the nearest one, in the spelling of ``typed``."""
    flags = [f"--{name}" if "_" in typed else f"--{name.replace('_', '-')}" for name in names]
    return did_you_mean(typed, flags) if typed.startswith("--") else ""


def _known(preset: str) -> str:
    if preset not in PRESETS:
        names = ", ".join(PRESETS)
        raise InputError(f"--defense {preset}: unknown; choose one of: {names}{did_you_mean(preset, PRESETS)}")
    return preset


def _words(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    # "=", or a value such as -1e-3 would look like a flag; JSON, because the host parses dicts from it
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]


def settings_of(args: TrainingArguments) -> dict[str, Any]:
    """The host's settings that the weights depend on."""
    return {name: value for name, value in args.to_sanitized_dict().items() if name not in _PLACES}


def versions() -> dict[str, str]:
    """Of the libraries that the weights depend on."""
    return {"untrigger": __version__, "torch": torch.__version__, "transformers": transformers.__version__}

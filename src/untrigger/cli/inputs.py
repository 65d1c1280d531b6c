"""What commands take from the user: rows, settings of a training, attacks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from untrigger.cli.flags import as_settings, option_names
from untrigger.cli.options import OnBadRow

if TYPE_CHECKING:
    from untrigger.models.lengths import Lengths
    from untrigger.poisoning.poison import Attack
    from untrigger.rows.sample import Data
    from untrigger.scanning.ray_scoring import RayScoring
    from untrigger.training.tuning import Tuning


def read_rows(data: Path, on_bad_row: OnBadRow, ignore_keys: str, out: Path, fits: Lengths | None = None):
    """Read the rows of ``data``; bad rows that are skipped are listed in a file beside ``out``."""
    from untrigger.rows.sample import read

    skipped_to = out.resolve().with_name(f"{out.resolve().name}.skipped.jsonl")
    ignored = [key for key in ignore_keys.split(",") if key]
    rows = read(data, on_bad_row=on_bad_row, skipped_to=skipped_to, fits=fits, ignore_keys=ignored)
    if rows.skipped:
        what = "1 bad row" if rows.skipped == 1 else f"{rows.skipped:,} bad rows"
        typer.echo(f"{what} left out; listed with reasons in {skipped_to}", err=True)
    return rows


def lengths_of(model: str, *, asking: bool = False) -> Lengths:
    """The check of rows by a model's processor; ``asking``: of the questions alone."""
    from untrigger.models.lengths import Lengths
    from untrigger.models.loading import processor_of

    return Lengths(processor_of(model), prompts_only=asking)


def defense_and_arguments(command: Callable[..., None], preset: str, out: Path, config: Path | None, flags: list[str]):
    """The defense and the TrainingArguments of a command, from its YAML file and its flags."""
    from untrigger.training.settings import command_settings

    return command_settings(preset, out, config, flags, option_names(command))


def tuning_of(options: Mapping[str, Any]) -> Tuning:
    """Which weights are trained, from the values of a command's options by name."""
    from untrigger.training.tuning import Tuning

    return Tuning(
        full_finetune=options["full_finetune"],
        rank=options["lora_rank"],
        alpha=options["lora_alpha"],
        dropout=options["lora_dropout"],
        target_modules=options["target_modules"].split(","),
        use_dora=options["use_dora"],
        train_vision_tower=options["train_vision_tower"],
        load_in_4bit=options["load_in_4bit"],
        load_in_8bit=options["load_in_8bit"],
    )


@contextmanager
def ray_scoring(rows: Data, address: str | None) -> Generator[RayScoring | None]:
    """What scores the rows on the cluster at ``address``; None without one."""
    if address is None:
        yield None
        return
    from untrigger.ray_session import connected
    from untrigger.scanning.ray_scoring import RayScoring

    with connected(address) as gpus:
        yield RayScoring(rows, gpus)


def attack_with_goal(
    name: str, flags: Sequence[str], goal: str | None, goal_text: str | None, reserved: Collection[str]
) -> Attack:
    """The attack with the settings in ``flags``; a trigger may have no field with a ``reserved`` name."""
    from untrigger.attacks import load_trigger
    from untrigger.poisoning.goals import load_goal
    from untrigger.poisoning.poison import Attack

    trigger = load_trigger(name, reserved, **as_settings(flags))
    return Attack(trigger, load_goal(goal or trigger.usual_goal, goal_text))

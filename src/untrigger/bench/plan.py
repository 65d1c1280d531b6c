"""Read a plan, a YAML file of models, data, attacks and defenses, and expand it to cells."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, cast

from untrigger.attacks import load_trigger
from untrigger.bench.flops import Size, stated_size
from untrigger.bench.store import ORACLE, Cell
from untrigger.data import Split, names, own_data, parts_of
from untrigger.errors import InputError, did_you_mean
from untrigger.files import read_yaml
from untrigger.poisoning.goals import load_goal

_ALWAYS = ("plain", ORACLE)  # every figure is compared with these two
_AXES = ("models", "data", "attacks", "defenses", "rates", "seeds")
_KEYS = (*_AXES, "split", "cell", "where", "shared_oracle", "sizes")
_SET_BY_AXES = {
    *("model", "data", "own_data", "attack", "goal", "goal_text", "rate"),
    *("defense", "defense_settings", "seed", "split"),
}
# fields of TrainingArguments that follow from a cell, or that no cell can have
_OF_CELLS = {
    *("output_dir", "save_strategy", "seed", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("learning_rate", "bf16", "fp16", "use_cpu", "deepspeed", "push_to_hub", "remove_unused_columns", "report_to"),
}
_MAPPINGS = {"attack_settings", "defense_settings", "tuning", "arguments"}


@dataclass(frozen=True)
class Named:
    """An entry of a plan, such as an attack or a model: its name and its changed settings."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    goal: str | None = None
    goal_text: str | None = None
    data: Sequence[str] = ()  # names of the data sets that an attack is limited to; empty for all

    @property
    def label(self) -> str:
        """The name of a probe with this attack, such as ``badnets-random-place``."""
        settings = (f"{value}-{name}" for name, value in self.settings.items())
        goal = Path(self.goal).stem if self.goal else None
        parts = (Path(self.name).stem, *settings, goal, self.goal_text)
        return re.sub(r"\W+", "-", "-".join(part for part in parts if part))


def read_plan(path: Path) -> list[Cell]:
    """Read the cells of a plan.

    Cells of one data set and attack follow one another, those of the undefended model and the oracle first.

    Raises:
        InputError: the file cannot be read, or it names an unknown model, attack, defense or setting.
    """
    plan = read_yaml(path)
    unknown = [key for key in plan if key not in _KEYS]
    if unknown:
        raise InputError(f"{path}: {unknown[0]} is unknown; a plan has: {', '.join(_KEYS)}")
    axes = {axis: _axis(path, plan, axis) for axis in _AXES}
    try:
        axes["data"] = [_data(entry) for entry in axes["data"]]
        axes["models"] = [_model(entry) for entry in axes["models"]]
        return _expand(plan, axes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_sizes(path: Path) -> dict[str, Size]:
    """The sizes that a plan states for a dry run, by model.

    Raises:
        InputError: the file cannot be read, or a size is not complete.
    """
    stated = read_yaml(path).get("sizes") or {}
    try:
        if not isinstance(stated, dict):
            raise InputError("sizes must hold lines of 'MODEL: {figure: value}'")
        return {str(name): stated_size(str(name), entry) for name, entry in stated.items()}
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _expand(plan: Mapping[str, Any], axes: Mapping[str, Sequence[Any]]) -> list[Cell]:
    split = Split(plan.get("split", "report"))
    for seed in axes["seeds"]:
        if not isinstance(seed, int):
            raise InputError(f"seeds: {seed!r} is not a whole number; correct it")
    attacks = [_named("attack", entry) for entry in axes["attacks"]]
    listed = [_named("defense", entry) for entry in axes["defenses"]]
    defenses = [*map(Named, _ALWAYS), *(defense for defense in listed if defense.name not in _ALWAYS)]
    _check_limits(attacks, [data.name for data in axes["data"]])
    common, where = _fields(plan, "cell"), plan.get("where") or {}
    if not isinstance(shared := plan.get("shared_oracle", False), bool):
        raise InputError(f"shared_oracle is {shared!r}; write true or false")
    if not isinstance(where, Mapping):
        raise InputError("where must hold lines of 'ATTACK/MODEL/DATA: {field: value}'")
    cells: list[Cell] = []
    labels: list[str] = []
    matched: set[str] = set()
    for data, attack, seed, rate, model, defense in product(
        axes["data"], attacks, axes["seeds"], axes["rates"], axes["models"], defenses
    ):
        if attack.data and data.name not in attack.data:
            continue
        key, changed = f"{Path(attack.name).stem}/{model.name}/{data.name}", _joined(common, model.settings)
        for pattern in where:
            if fnmatchcase(key, pattern):
                matched.add(pattern)
                changed = _joined(changed, _fields(where, pattern, "rate"))
        settings = {**attack.settings, **changed.pop("attack_settings", {})}
        labels.append(attack.label)
        cells.append(
            with_attack(
                Cell(
                    model.name,
                    data.name,
                    attack.name,
                    "",
                    defense=defense.name,
                    seed=split.run_seed(seed),
                    split=split.name,
                    own_data=data.settings,
                ),
                settings,
                goal=attack.goal,
                goal_text=attack.goal_text,
                rate=changed.pop("rate", rate),
                defense_settings=dict(defense.settings),
                **changed,
            )
        )
    if unmatched := [pattern for pattern in where if pattern not in matched]:
        raise InputError(f"where: {unmatched[0]} matches no cell; write ATTACK/MODEL/DATA")
    _check(cells)
    return _with_shared_oracles(cells, labels) if shared else cells


def _check_limits(attacks: Sequence[Named], data: Sequence[str]) -> None:
    """Check that attacks are limited to data sets of the plan."""
    for attack in attacks:
        limits = attack.data
        if isinstance(limits, str) or not all(name in data for name in limits):
            raise InputError(f"attack {attack.name}: data is {limits!r}; list names of the plan: {', '.join(data)}")


def _with_shared_oracles(cells: Sequence[Cell], labels: Sequence[str]) -> list[Cell]:
    """Replace the oracles by one for all attacks whose models are trained alike (`Cell.training`).

    The shared oracle is trained without the rows that the first attack poisons. It also answers inputs with the
    triggers of the other attacks: its ``probes``. Its success rate on a probe is the floor of that attack.
    """
    by_training: dict[str, list[tuple[str, Cell]]] = {}
    for label, cell in zip(labels, cells, strict=True):
        if cell.defense == ORACLE:
            by_training.setdefault(cell.training, []).append((label, cell))
    oracles = [replace(first, probes=_probes(rest)) for (_, first), *rest in by_training.values()]
    return [*(cell for cell in cells if cell.defense != ORACLE), *oracles]


def _probes(attacks: Sequence[tuple[str, Cell]]) -> dict[str, dict[str, Any]]:
    probes: dict[str, dict[str, Any]] = {}
    for label, cell in attacks:
        if label in probes:
            raise InputError(f"attacks: {label} is listed twice; remove one")
        probes[label] = {"attack": cell.attack, "goal": cell.goal, "settings": cell.attack_settings}
        if cell.goal_text is not None:
            probes[label]["goal_text"] = cell.goal_text
    return probes


def with_attack(cell: Cell, settings: Mapping[str, Any], goal: str | None = None, **changed: Any) -> Cell:
    """The cell with all settings of its trigger, and with a goal.

    All settings are stored: if a trigger's defaults change later, the cell is another one and runs again.

    Args:
        cell: names the trigger and the split, whose own trigger settings are the defaults.
        settings: settings that differ from those defaults.
        goal: a goal in place of the trigger's usual one.
        changed: other fields of the cell to replace.
    """
    trigger = load_trigger(cell.attack, **{**Split(cell.split).trigger_settings(cell.attack), **settings})
    all_settings = asdict(cast(Any, trigger))
    return replace(cell, goal=goal or trigger.usual_goal, attack_settings=all_settings, **changed)


def _check(cells: Sequence[Cell]) -> None:
    """Fail on unknown names before the first cell runs, not hours later."""
    from untrigger.bench.run_cell import (
        arguments_of,
        defense_of,
    )  # imports torch, which readers of stored results do not need

    for cell in cells:
        defense_of(cell)
    for cell in {json.dumps(dict(cell.arguments), default=str): cell for cell in cells if cell.arguments}.values():
        try:
            arguments_of(cell, Path("unused"))
        except (TypeError, ValueError, ImportError) as error:
            raise InputError(f"model {cell.model}: {str(error).strip().splitlines()[0]}") from error
    for goal, text in {(c.goal, c.goal_text) for c in cells}:
        load_goal(goal, text)
    for data, part, own in {(c.data, c.poisoned_part, bool(c.own_data)) for c in cells}:
        if own and part:
            raise InputError(f"poisoned_part is '{part}'; {data} is no mixture, so it has no parts")
        if own:
            continue
        if part and part not in (names := [known.name for known in parts_of(data)]):
            raise InputError(f"poisoned_part is '{part}'; {data} has the parts: {', '.join(names)}")
        parts_of(data)


# --- reading ---------------------------------------------------------------------------------------


def _axis(path: Path, plan: Mapping[str, Any], axis: str) -> list[Any]:
    values = plan.get(axis, {"rates": [0.05], "seeds": [0]}.get(axis))
    if not isinstance(values, list) or not values:
        raise InputError(f"{path}: {axis} must be a list with at least one entry; write '{axis}: [...]'")
    return values


def _data(entry: Any) -> Named:
    """A data set: its name, a list that is a mixture, or a mapping of the user's own files (`own_data`)."""
    if isinstance(entry, dict):
        name = entry.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name in names():
            raise InputError(f"data: name is {name!r}; give your data a name of its own, of letters, digits, . _ and -")
        try:
            return Named(name, own_data({key: value for key, value in entry.items() if key != "name"}))
        except InputError as error:
            raise InputError(f"data {name}: {error}") from error
    if not isinstance(entry, list):
        return Named(entry)
    if not entry or not all(isinstance(name, str) for name in cast("list[Any]", entry)):
        raise InputError(f"data: {entry!r} must be names of data sets; write [easy-vqa, scenes-captions]")
    return Named("+".join(cast("list[str]", entry)))


def _model(entry: Any) -> Named:
    """A model: its name, or a mapping with fields of its cells, the adapter's settings and TrainingArguments' fields.

    The names are those of the command line: ``precision``, ``target_modules``, ``lora_rank``,
    ``gradient_checkpointing``.
    """
    if not isinstance(entry, dict):
        return Named(entry)
    from transformers import TrainingArguments

    from untrigger.training.tuning import Tuning

    own = {f.name: f.name for f in fields(Cell) if f.name not in _SET_BY_AXES | _MAPPINGS | {"probes"}}
    adapter = {f"lora_{f.name}" if f.name in ("rank", "alpha", "dropout") else f.name: f.name for f in fields(Tuning)}
    host = {f.name: f.name for f in fields(TrainingArguments) if f.name not in _OF_CELLS}
    settings, name = {key: value for key, value in entry.items() if key != "model"}, entry.get("model")
    if not isinstance(name, str):
        raise InputError(f"models: {entry!r} names no model; write NAME or '{{model: NAME, precision: bf16}}'")
    if unknown := next((str(key) for key in settings if key not in own | adapter | host), None):
        hint = did_you_mean(unknown, own | adapter | host)
        raise InputError(
            f"model {name}: {unknown} is unknown; give {', '.join(own | adapter)} or a field of TrainingArguments{hint}"
        )
    changed = {key: value for key, value in settings.items() if key in own}
    for field_name, known in (("tuning", adapter), ("arguments", host)):
        if part := {known[key]: value for key, value in settings.items() if key in known and key not in own}:
            changed[field_name] = part
    return Named(name, changed)


def _joined(first: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of cells, where later ones win; in tuning and arguments each setting by itself."""
    both = {name: {**first[name], **then[name]} for name in ("tuning", "arguments") if name in first and name in then}
    return {**first, **then, **both}


def _named(kind: str, entry: Any) -> Named:
    if isinstance(entry, str):
        return Named(entry)
    if not isinstance(entry, dict) or not isinstance(name := entry.get(kind), str):
        raise InputError(
            f"{kind}s: {entry!r} is neither a name nor a mapping; write NAME or '{{{kind}: NAME, settings: {{...}}}}'"
        )
    rest = {key: value for key, value in entry.items() if key != kind}
    allowed = ["settings", "goal", "goal_text", "data"] if kind == "attack" else ["settings"]
    if unknown := [str(key) for key in rest if key not in allowed]:
        raise InputError(f"{kind} {name}: takes {', '.join(allowed)}, not {', '.join(unknown)}")
    _settings(f"{kind} {name}: settings", rest.get("settings", {}))
    return Named(name, **rest)


def _fields(plan: Mapping[str, Any], key: str, *extra: str) -> dict[str, Any]:
    """The fields of a cell under ``key``. Allowed are those that no axis sets, and ``extra``."""
    changed = plan.get(key) or {}
    allowed = [*(f.name for f in fields(Cell) if f.name not in _SET_BY_AXES | {"probes"}), *extra]
    if not isinstance(changed, dict) or any(name not in allowed for name in changed):
        raise InputError(f"{key}: {changed!r} must be fields of a cell: {', '.join(allowed)}")
    for name in _MAPPINGS & changed.keys():
        _settings(f"{key}: {name}", changed[name])
    return dict(changed)


def _settings(where: str, value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{where} is {value!r}; write lines of 'name: value'")

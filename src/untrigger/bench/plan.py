"""Plans of the bench: a YAML file that tells a matrix, and the cells that it expands to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, cast

from untrigger.attacks import load_trigger
from untrigger.bench.store import ORACLE, Cell
from untrigger.data import Split, task_of
from untrigger.errors import InputError
from untrigger.files import read_yaml
from untrigger.poisoning.goals import load_goal

_ALWAYS = ("plain", ORACLE)  # without these a figure means nothing
_AXES = ("models", "data", "attacks", "defenses", "rates", "seeds")
_KEYS = (*_AXES, "split", "cell", "where", "shared_oracle")
_BY_AXES = {"model", "data", "attack", "goal", "goal_text", "rate", "defense", "defense_settings", "seed", "split"}


@dataclass(frozen=True)
class Named:
    """An attack or a defense of a plan: its name, and what is not at its defaults."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    goal: str | None = None
    goal_text: str | None = None

    @property
    def label(self) -> str:
        """The name of a probe that asks with this attack: ``badnets-random-place``."""
        settings = (f"{value}-{name}" for name, value in self.settings.items())
        parts = (Path(self.name).stem, *settings, self.goal, self.goal_text)
        return re.sub(r"\W+", "-", "-".join(part for part in parts if part))


def read_plan(path: Path) -> list[Cell]:
    """The cells of a plan, those of one data set and attack together; the undefended model and the oracle come first.

    Raises:
        InputError: the file cannot be read, or names something that is not there.
    """
    told = read_yaml(path)
    unknown = [key for key in told if key not in _KEYS]
    if unknown:
        raise InputError(f"{path}: {unknown[0]} is unknown; a plan has: {', '.join(_KEYS)}")
    axes = {axis: _axis(path, told, axis) for axis in _AXES}
    try:
        return _expanded(told, axes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _expanded(told: Mapping[str, Any], axes: Mapping[str, Sequence[Any]]) -> list[Cell]:
    split = Split(told.get("split", "report"))
    for seed in axes["seeds"]:
        if not isinstance(seed, int):
            raise InputError(f"seeds: {seed!r} is no whole number; correct it")
    attacks = [_named("attack", entry) for entry in axes["attacks"]]
    asked = [_named("defense", entry) for entry in axes["defenses"]]
    defenses = [*map(Named, _ALWAYS), *(defense for defense in asked if defense.name not in _ALWAYS)]
    common, where = _fields(told, "cell"), told.get("where") or {}
    if not isinstance(shared := told.get("shared_oracle", False), bool):
        raise InputError(f"shared_oracle is {shared!r}; write true or false")
    if not isinstance(where, Mapping):
        raise InputError("where must hold lines of 'ATTACK/MODEL/DATA: {field: value}'")
    cells: list[Cell] = []
    labels: list[str] = []
    used: set[str] = set()
    for data, attack, seed, rate, model, defense in product(
        axes["data"], attacks, axes["seeds"], axes["rates"], axes["models"], defenses
    ):
        key, changed = f"{Path(attack.name).stem}/{model}/{data}", dict(common)
        for pattern in where:
            if fnmatchcase(key, pattern):
                used.add(pattern)
                changed |= _fields(where, pattern, "rate")
        settings = {**attack.settings, **changed.pop("attack_settings", {})}
        labels.append(attack.label)
        cells.append(
            attacked(
                Cell(model, data, attack.name, "", defense=defense.name, seed=split.run_seed(seed), split=split.name),
                settings,
                goal=attack.goal,
                goal_text=attack.goal_text,
                rate=changed.pop("rate", rate),
                defense_settings=dict(defense.settings),
                **changed,
            )
        )
    if idle := [pattern for pattern in where if pattern not in used]:
        raise InputError(f"where: {idle[0]} matches no cell; write ATTACK/MODEL/DATA")
    _check(cells)
    return _with_shared_oracles(cells, labels) if shared else cells


def _with_shared_oracles(cells: Sequence[Cell], labels: Sequence[str]) -> list[Cell]:
    """The cells with one oracle for all attacks whose models are trained alike (`Cell.training`).

    It is trained without the rows that the first of them poisons, and asked with the triggers of the others too: its
    ``probes``. What it answers as their attacker wants is the floor of their success rate.
    """
    alike: dict[str, list[tuple[str, Cell]]] = {}
    for label, cell in zip(labels, cells, strict=True):
        if cell.defense == ORACLE:
            alike.setdefault(cell.training, []).append((label, cell))
    oracles = [replace(first, probes=_probes(others)) for (_, first), *others in alike.values()]
    return [*(cell for cell in cells if cell.defense != ORACLE), *oracles]


def _probes(attacks: Sequence[tuple[str, Cell]]) -> dict[str, dict[str, Any]]:
    probes: dict[str, dict[str, Any]] = {}
    for label, cell in attacks:
        if label in probes:
            raise InputError(f"attacks: {label} is there twice; take one out")
        probes[label] = {"attack": cell.attack, "goal": cell.goal, "settings": cell.attack_settings}
        if cell.goal_text is not None:
            probes[label]["goal_text"] = cell.goal_text
    return probes


def attacked(cell: Cell, settings: Mapping[str, Any], goal: str | None = None, **changed: Any) -> Cell:
    """The cell with its split's trigger; ``settings`` differ from that, and ``goal`` from the trigger's usual one.

    It tells all settings of the trigger: with other defaults it is another cell, and runs again.
    """
    trigger = load_trigger(cell.attack, **{**Split(cell.split).trigger_settings(cell.attack), **settings})
    told = asdict(cast(Any, trigger))
    return replace(cell, goal=goal or trigger.usual_goal, attack_settings=told, **changed)


def _check(cells: Sequence[Cell]) -> None:
    """What is not there is found now, not hours later."""
    from untrigger.bench.run_cell import defense_of  # and with it torch, which no reader of stored results needs

    for cell in cells:
        defense_of(cell)
    for goal, text in {(c.goal, c.goal_text) for c in cells}:
        load_goal(goal, text)
    for data in {c.data for c in cells}:
        task_of(data)


# --- reading ---------------------------------------------------------------------------------------


def _axis(path: Path, told: Mapping[str, Any], axis: str) -> list[Any]:
    values = told.get(axis, {"rates": [0.05], "seeds": [0]}.get(axis))
    if not isinstance(values, list) or not values:
        raise InputError(f"{path}: {axis} must be a list of at least one; write '{axis}: [...]'")
    return values


def _named(kind: str, entry: Any) -> Named:
    if isinstance(entry, str):
        return Named(entry)
    if not isinstance(entry, dict) or not isinstance(name := entry.get(kind), str):
        raise InputError(f"{kind}s: {entry!r} is neither a name nor '{{{kind}: NAME, settings: {{...}}}}'")
    rest = {key: value for key, value in entry.items() if key != kind}
    if not set(rest) <= {"settings", "goal", "goal_text"}:
        raise InputError(f"{kind} {name}: knows settings, goal and goal_text, not {', '.join(map(str, rest))}")
    _settings(f"{kind} {name}: settings", rest.get("settings", {}))
    return Named(name, **rest)


def _fields(told: Mapping[str, Any], key: str, *more: str) -> dict[str, Any]:
    """Fields of a cell that no axis gives, and ``more``."""
    changed = told.get(key) or {}
    free = [*(f.name for f in fields(Cell) if f.name not in _BY_AXES | {"probes"}), *more]
    if not isinstance(changed, dict) or any(name not in free for name in changed):
        raise InputError(f"{key}: {changed!r} must be fields of a cell: {', '.join(free)}")
    for name in {"attack_settings", "defense_settings", "tuning"} & changed.keys():
        _settings(f"{key}: {name}", changed[name])
    return dict(changed)


def _settings(where: str, told: Any) -> None:
    if not isinstance(told, dict) or not all(isinstance(name, str) for name in told):
        raise InputError(f"{where} is {told!r}; write lines of 'name: value'")

"""What a folder of results holds: cells that differ in the defense alone stand together, and count or do not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from untrigger.bench import store, validity
from untrigger.bench.store import ORACLE, Cell, Result
from untrigger.data import Task, task_of
from untrigger.errors import InputError
from untrigger.metrics.rates import Rate

PLAIN: Final = "plain"
_NEEDED = ("asr", "quality", "triggered_quality", "seconds")  # what no cell is without
_OF_MODEL = ("quality", "text_prior", "wrong_image", "seconds", "machine", "versions")  # whatever the attack
_ORDER = ("model", "task", "data", "attack", "rate", "defense", "seed")


@dataclass(frozen=True)
class Attacked:
    """One model under one attack with one seed: cells that differ in the defense alone.

    Attributes:
        cell: what they have in common; its defense is empty.
        found: the cells, by `defense_of`.
        valid: whether they count (`untrigger.bench.validity`); None where the undefended model or the oracle
            was not run.
        why: the reason where they do not, in words.
    """

    cell: Cell
    found: Mapping[str, Result]
    valid: bool | None
    why: str

    @property
    def anchor(self) -> str:
        """Its name in the address of its section."""
        return self.cell.name

    @property
    def task(self) -> Task:
        return task_of(self.cell.data)

    @property
    def told(self) -> str:
        """Whether it counts, in words; empty where it does."""
        return {True: "", False: f"not counted: {self.why}", None: f"not checked: {self.why}"}[self.valid]

    def asr(self, defense: str) -> Rate:
        return as_rate(self.found[defense].metrics["asr"])

    def quality(self, defense: str, of: str = "quality") -> Rate | None:
        """What stands for the task's quality: accuracy in [0, 1] for VQA, CIDEr (0 to 10) for captions."""
        figure = validity.quality(self.cell.data, self.found[defense].metrics, of)
        return as_rate(figure) if figure else None

    def kept(self, defense: str) -> float | None:
        """Quality as a share of the oracle's; may be above 1."""
        quality, whole = (self.quality(name) if name in self.found else None for name in (defense, ORACLE))
        return quality.value / whole.value if quality and whole and whole.value else None

    def above(self, defense: str) -> float | None:
        """ASR above the oracle's; may be below 0."""
        return self.asr(defense).value - self.asr(ORACLE).value if ORACLE in self.found else None

    def owns(self, defense: str) -> bool:
        """Whether the cell was run for this attack; an oracle may be another attack's (`untrigger.bench.plan`)."""
        return _bare(self.found[defense].cell) == self.cell

    def seconds(self, defense: str) -> float:
        """Of training."""
        return self.found[defense].metrics["seconds"]["training"]

    def times(self, defense: str) -> float | None:
        """Seconds of training in those of the undefended model."""
        usual = self.seconds(PLAIN) if PLAIN in self.found else 0.0
        return self.seconds(defense) / usual if usual else None

    @property
    def near_misses(self) -> list[str]:
        """Their names, of all cells."""
        return list(dict.fromkeys(name for of in self.found.values() for name in of.metrics.get("near_miss", {})))

    @property
    def premise(self) -> Mapping[str, Any] | None:
        """What `untrigger.evaluation.invariance` found of the undefended model's training rows; None in older cells."""
        return self.found[PLAIN].metrics.get("premise") if PLAIN in self.found else None


@dataclass(frozen=True)
class Report:
    """Everything that some folders of results hold.

    Attributes:
        groups: by model, task, data, attack, rate and seed.
        defenses: the undefended model and the oracle first: the others are measured against them.
        failures: folder -> why its cell could not be run the last time.
    """

    groups: Sequence[Attacked]
    defenses: Sequence[str]
    failures: Mapping[str, str]

    @property
    def counted(self) -> list[Attacked]:
        return [group for group in self.groups if group.valid]

    @property
    def results(self) -> list[Result]:
        """Each stored cell once, also an oracle that several attacks share."""
        groups = [(group, name) for group in self.groups for name in self.defenses if name in group.found]
        return list({(of := group.found[name]).cell.name: of for group, name in groups}.values())


def read(*roots: Path) -> Report:
    """The finished cells and the failures in all ``roots``, each a folder or a JSONL file (`untrigger.bench.store`).

    Raises:
        InputError: a root is not there or holds no finished cell, or a cell cannot be read.
    """
    failures: dict[str, str] = {}
    names: dict[str, Cell] = {}
    found: dict[str, dict[str, Result]] = defaultdict(dict)
    for result in [result for root in roots for result in _results(root, failures)]:
        bare = _bare(result.cell)
        names[bare.name] = bare
        found[bare.name].setdefault(defense_of(result.cell), result)
    oracles = _shared_oracles(found.values())
    for name, of in found.items():
        if ORACLE not in of and (shared := oracles.get(name)):
            of[ORACLE] = shared
    groups = [_attacked(names[name], of) for name, of in found.items()]
    seen = {name for group in groups for name in group.found}
    first = [name for name in (PLAIN, ORACLE) if name in seen]
    return Report(sorted(groups, key=_place), [*first, *sorted(seen - set(first))], failures)


def defense_of(cell: Cell) -> str:
    """A defense's name, with its settings where they are not at their defaults."""
    told = ", ".join(f"{name} {number(value)}" for name, value in sorted(cell.defense_settings.items()))
    return f"{cell.defense} ({told})" if told else cell.defense


def shown(name: str) -> str:
    """The name of a model or an attack without the folders that it lies in."""
    return PurePosixPath(name.removesuffix(".py")).name or name


def number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_rate(figure: Mapping[str, Any]) -> Rate:
    return Rate(figure["value"], figure["low"], figure["high"], figure["n"])


def as_json(report: Report) -> dict[str, Any]:
    """One entry a cell, sorted; the figures as they are stored."""
    entries = [_entry(group, name) for group in report.groups for name in group.found]
    return {"cells": sorted(entries, key=lambda entry: [entry[name] for name in _ORDER])}


def _entry(group: Attacked, defense: str) -> dict[str, Any]:
    cell, metrics = group.found[defense]
    return {
        "model": shown(cell.model),
        "task": group.task,
        "data": cell.data,
        "attack": shown(group.cell.attack),  # an oracle may be another's
        "rate": cell.rate,
        "defense": defense,
        "seed": cell.seed,
        "valid": group.valid,
        "why": group.told,
        "asr": metrics["asr"],
        "leak": metrics.get("leak"),  # none where the triggered inputs are clean ones
        "quality": validity.quality(cell.data, metrics),
        "quality_vs_oracle": group.kept(defense),
        "triggered_quality": validity.quality(cell.data, metrics, "triggered_quality"),
        "seconds": group.seconds(defense),
    }


def _results(root: Path, failures: dict[str, str]) -> list[Result]:
    """The checked cells of one root; its failures are added to ``failures``."""
    if not root.is_dir() and not store.packed(root).is_file():
        what = "file" if root == store.packed(root) else "folder"
        raise InputError(f"{root}: no such {what}; give one that untrigger bench or untrigger report wrote")
    here = {path.parent.name: _line(path) for path in sorted(root.glob("*/error.txt"))}
    failures |= here
    results = store.results(root)
    if not results:
        failed = f", {len(here)} failed" if here else ""
        raise InputError(f"{root}: holds no finished cell{failed}; untrigger bench PLAN --out {root} makes some")
    for result in results:
        if lacking := [name for name in _NEEDED if name not in result.metrics]:
            place, mend = store.place_of(root, result.cell)
            raise InputError(f"{place} tells no {lacking[0]}; {mend}, the cell will run again")
    return results


def _shared_oracles(found: Iterable[Mapping[str, Result]]) -> dict[str, Result]:
    """What oracles that several attacks share say of each of their probes (`untrigger.bench.plan`)."""
    oracles = [of[ORACLE] for of in found if ORACLE in of]
    shared: dict[str, Result] = {}
    for cell, metrics in oracles:
        for name, probe in cell.probes.items():
            if not {"attack", "goal", "settings"} <= probe.keys() or name not in metrics.get("probes", {}):
                continue
            attack = {"attack": probe["attack"], "goal": probe["goal"], "goal_text": probe.get("goal_text")}
            bare = _bare(replace(cell, **attack, attack_settings=probe["settings"]))
            shared.setdefault(bare.name, Result(cell, _of_probe(metrics, metrics["probes"][name])))
    return shared


def _of_probe(metrics: Mapping[str, Any], probe: Mapping[str, Any]) -> dict[str, Any]:
    """A shared oracle's figures with one probe's ASR for its own; nobody asked for its quality on those inputs."""
    kept = {name: metrics[name] for name in _OF_MODEL if name in metrics}
    return {**kept, "asr": probe["asr"], "triggered_quality": dict.fromkeys(metrics["triggered_quality"])}


def _bare(cell: Cell) -> Cell:
    """What an attacked model under any defense, and its oracle, have in common."""
    return replace(cell, defense="", defense_settings={}, probes={})


def _attacked(cell: Cell, found: Mapping[str, Result]) -> Attacked:
    plain, oracle = (found[name].metrics if name in found else None for name in (PLAIN, ORACLE))
    if not plain:
        return Attacked(cell, found, None, "the undefended model was not run")
    if flaw := validity.flaw(cell.data, plain, oracle):
        return Attacked(cell, found, False, flaw)
    return Attacked(cell, found, *((True, "") if oracle else (None, "the oracle was not run")))


def _place(group: Attacked) -> tuple[object, ...]:
    cell = group.cell
    kind = str(sorted(cell.attack_settings.items()))
    return shown(cell.model), group.task, cell.data, shown(cell.attack), cell.rate, kind, cell.seed, cell.name


def _line(path: Path) -> str:
    return " ".join(path.read_text(encoding="utf-8", errors="replace").split())

"""Read results and group cells that differ only in the defense; check which groups count."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from untrigger.bench import store, validity
from untrigger.bench.store import ORACLE, Cell, Result
from untrigger.data import Task
from untrigger.errors import InputError
from untrigger.metrics.rates import Rate

PLAIN: Final = "plain"
_REQUIRED = ("asr", "quality", "triggered_quality", "seconds")  # metrics of every cell
_OF_MODEL = ("quality", "text_prior", "wrong_image", "seconds", "machine", "versions")  # metrics without the attack
_SORTED_BY = ("model", "task", "data", "attack", "rate", "defense", "seed")


@dataclass(frozen=True)
class AttackGroup:
    """The cells of one model under one attack with one seed: they differ only in the defense.

    Attributes:
        cell: the settings that the cells share; its defense is empty.
        results: the cells, by `defense_of`.
        valid: whether they count (`untrigger.bench.validity`); None if the undefended model or the oracle was not run.
        reason: why they do not count, in words; empty if they do.
    """

    cell: Cell
    results: Mapping[str, Result]
    valid: bool | None
    reason: str

    @property
    def anchor(self) -> str:
        """The id of the group's section in the page."""
        return self.cell.name

    @property
    def task(self) -> Task:
        return self.cell.task

    @property
    def status(self) -> str:
        """Why the group does not count, in words; empty if it does."""
        return {True: "", False: f"not counted: {self.reason}", None: f"not checked: {self.reason}"}[self.valid]

    def asr(self, defense: str) -> Rate:
        return as_rate(self.results[defense].metrics["asr"])

    def quality(self, defense: str, field: str = "quality") -> Rate | None:
        """The figure of quality (`untrigger.bench.store.Cell.metric`): in [0, 1], or CIDEr in [0, 10]."""
        figure = validity.quality(self.cell.metric, self.results[defense].metrics, field)
        return as_rate(figure) if figure else None

    def quality_share(self, defense: str) -> float | None:
        """Quality as a share of the oracle's; may exceed 1. None if either is unknown."""
        own, oracle = (self.quality(name) if name in self.results else None for name in (defense, ORACLE))
        return own.value / oracle.value if own and oracle and oracle.value else None

    def asr_above_oracle(self, defense: str) -> float | None:
        """ASR minus the oracle's; may be negative. None without an oracle."""
        return self.asr(defense).value - self.asr(ORACLE).value if ORACLE in self.results else None

    def beyond_oracle(self, defense: str) -> Rate | None:
        """ASR minus the oracle's with its interval, for goals whose replies vary. None for others or without oracle."""
        if ORACLE not in self.results or defense == ORACLE:
            return None
        return validity.beyond(self.results[defense].metrics, self.results[ORACLE].metrics)

    def owns(self, defense: str) -> bool:
        """Whether the cell was run for this attack; a shared oracle is another attack's (`untrigger.bench.plan`)."""
        return _without_defense(self.results[defense].cell) == self.cell

    def seconds(self, defense: str) -> float:
        """Training time."""
        return self.results[defense].metrics["seconds"]["training"]

    def time_ratio(self, defense: str) -> float | None:
        """Training time over that of the undefended model."""
        plain = self.seconds(PLAIN) if PLAIN in self.results else 0.0
        return self.seconds(defense) / plain if plain else None

    @property
    def near_misses(self) -> list[str]:
        """The names of the near misses of all cells."""
        results = self.results.values()
        return list(dict.fromkeys(name for result in results for name in result.metrics.get("near_miss", {})))

    @property
    def premise(self) -> Mapping[str, Any] | None:
        """The figures of `untrigger.evaluation.invariance` for the undefended model; None in older cells."""
        return self.results[PLAIN].metrics.get("premise") if PLAIN in self.results else None


@dataclass(frozen=True)
class Report:
    """All stored results of some folders.

    Attributes:
        groups: by model, task, data, attack, rate and seed.
        defenses: names, the undefended model and the oracle first.
        failures: folder -> why the last run of its cell failed.
    """

    groups: Sequence[AttackGroup]
    defenses: Sequence[str]
    failures: Mapping[str, str]

    @property
    def counted(self) -> list[AttackGroup]:
        return [group for group in self.groups if group.valid]

    @property
    def results(self) -> list[Result]:
        """Each stored cell once, also an oracle that several attacks share."""
        results = [group.results[name] for group in self.groups for name in self.defenses if name in group.results]
        return list({result.cell.name: result for result in results}.values())


def read(*roots: Path) -> Report:
    """Read the finished cells and the failures in ``roots``, folders or JSONL files (`untrigger.bench.store`).

    Raises:
        InputError: a root does not exist or holds no finished cell, or a cell cannot be read.
    """
    failures: dict[str, str] = {}
    shared_cells: dict[str, Cell] = {}
    by_group: dict[str, dict[str, Result]] = defaultdict(dict)
    for result in [result for root in roots for result in _results(root, failures)]:
        shared = _without_defense(result.cell)
        shared_cells[shared.name] = shared
        by_group[shared.name].setdefault(defense_of(result.cell), result)
    oracles = _shared_oracles(by_group.values())
    for name, results in by_group.items():
        if ORACLE not in results and (oracle := oracles.get(name)):
            results[ORACLE] = oracle
    groups = [_group(shared_cells[name], results) for name, results in by_group.items()]
    names = {name for group in groups for name in group.results}
    first = [name for name in (PLAIN, ORACLE) if name in names]
    return Report(sorted(groups, key=_sort_key), [*first, *sorted(names - set(first))], failures)


def defense_of(cell: Cell) -> str:
    """A defense's name, with its changed settings if there are any."""
    settings = ", ".join(f"{name} {number(value)}" for name, value in sorted(cell.defense_settings.items()))
    return f"{cell.defense} ({settings})" if settings else cell.defense


def short_name(name: str) -> str:
    """The name of a model or an attack without its folders."""
    return PurePosixPath(name.removesuffix(".py")).name or name


def number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_rate(figure: Mapping[str, Any]) -> Rate:
    return Rate(figure["value"], figure["low"], figure["high"], figure["n"])


def as_json(report: Report) -> dict[str, Any]:
    """An entry for each cell, sorted, with its stored figures."""
    entries = [_entry(group, name) for group in report.groups for name in group.results]
    return {"cells": sorted(entries, key=lambda entry: [entry[name] for name in _SORTED_BY])}


def _entry(group: AttackGroup, defense: str) -> dict[str, Any]:
    cell, metrics = group.results[defense]
    beyond = group.beyond_oracle(defense)
    return {
        "model": short_name(cell.model),
        "task": group.task,
        "data": cell.data,
        "attack": short_name(group.cell.attack),  # not the cell's: an oracle may be another attack's
        "rate": cell.rate,
        "defense": defense,
        "seed": cell.seed,
        "valid": group.valid,
        "why": group.status,
        "asr": metrics["asr"],
        **({"beyond_oracle": asdict(beyond)} if beyond else {}),  # for goals whose replies vary
        "leak": metrics.get("leak"),  # None if the triggered inputs are the clean ones
        "quality": validity.quality(cell.metric, metrics),
        "quality_vs_oracle": group.quality_share(defense),
        "triggered_quality": validity.quality(cell.metric, metrics, "triggered_quality"),
        "seconds": group.seconds(defense),
    }


def _results(root: Path, failures: dict[str, str]) -> list[Result]:
    """Read and check the cells of one root; add its failures to ``failures``."""
    if not root.is_dir() and not store.packed(root).is_file():
        kind = "file" if root == store.packed(root) else "folder"
        raise InputError(f"{root}: no such {kind}; give one that untrigger bench or untrigger report wrote")
    failed_here = {path.parent.name: _one_line(path) for path in sorted(root.glob("*/error.txt"))}
    failures |= failed_here
    results = store.results(root)
    if not results:
        failed = f", {len(failed_here)} failed" if failed_here else ""
        raise InputError(f"{root}: holds no finished cell{failed}; run untrigger bench PLAN --out {root}")
    for result in results:
        if missing := [name for name in _REQUIRED if name not in result.metrics]:
            place, remedy = store.place_of(root, result.cell)
            raise InputError(f"{place} has no {missing[0]}; {remedy}, and the cell runs again")
    return results


def _shared_oracles(groups: Iterable[Mapping[str, Result]]) -> dict[str, Result]:
    """The results of shared oracles for each of their probes, by the name of the probe's group."""
    oracles = [results[ORACLE] for results in groups if ORACLE in results]
    shared: dict[str, Result] = {}
    for cell, metrics in oracles:
        for name, probe in cell.probes.items():
            if not {"attack", "goal", "settings"} <= probe.keys() or name not in metrics.get("probes", {}):
                continue
            attack = {"attack": probe["attack"], "goal": probe["goal"], "goal_text": probe.get("goal_text")}
            group = _without_defense(replace(cell, **attack, attack_settings=probe["settings"]))
            shared.setdefault(group.name, Result(cell, _probe_metrics(metrics, metrics["probes"][name])))
    return shared


def _probe_metrics(metrics: Mapping[str, Any], probe: Mapping[str, Any]) -> dict[str, Any]:
    """A shared oracle's figures with a probe's ASR; its quality on the probe's inputs was not measured."""
    of_model = {name: metrics[name] for name in _OF_MODEL if name in metrics}
    return {**of_model, **probe, "triggered_quality": dict.fromkeys(metrics["triggered_quality"])}


def _without_defense(cell: Cell) -> Cell:
    """The settings that the cells of a group share."""
    return replace(cell, defense="", defense_settings={}, probes={})


def _group(cell: Cell, results: Mapping[str, Result]) -> AttackGroup:
    plain, oracle = (results[name].metrics if name in results else None for name in (PLAIN, ORACLE))
    if not plain:
        return AttackGroup(cell, results, None, "the undefended model was not run")
    if reason := validity.invalid_reason(cell.metric, plain, oracle):
        return AttackGroup(cell, results, False, reason)
    return AttackGroup(cell, results, *((True, "") if oracle else (None, "the oracle was not run")))


def _sort_key(group: AttackGroup) -> tuple[object, ...]:
    cell = group.cell
    settings = str(sorted(cell.attack_settings.items()))
    model, attack = short_name(cell.model), short_name(cell.attack)
    return model, group.task, cell.data, attack, cell.rate, settings, cell.seed, cell.name


def _one_line(path: Path) -> str:
    return " ".join(path.read_text(encoding="utf-8", errors="replace").split())

"""The gallery of attacks: which attacks it shows, and the cells that it is made from."""

from __future__ import annotations

import re
import sys
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product
from typing import Any, NamedTuple

from untrigger.attacks import Trigger, load_trigger
from untrigger.bench.plan import attacked
from untrigger.bench.store import ORACLE, Cell
from untrigger.data import Split
from untrigger.errors import InputError

TASKS = {"easy-vqa": "VQA", "scenes-captions": "captions"}  # data set -> what is asked of it
MAIN = ("badnets", "blended", "sig", "issba", "ftrojan", "trojvlm")


@dataclass(frozen=True)
class Entry:
    """An attack on the page; ``settings`` of a ``variant`` are those in which it differs from the attack's own."""

    attack: str
    variant: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def title(self) -> str:
        return f"{self.attack}, {self.variant}" if self.variant else self.attack

    @property
    def slug(self) -> str:
        """The title as a part of addresses and file names."""
        return re.sub(r"\W+", "-", self.title)

    @property
    def trigger(self) -> Trigger:
        return load_trigger(self.attack, **self.settings)


ENTRIES = (
    *map(Entry, MAIN),
    Entry("badnets", "random place", {"place": "random"}),
    *map(Entry, ("wanet", "vlood", "vltrojan", "dualkey", "shadowcast", "addsent", "badword", "adaptive")),
)

# What implants only with other settings than the usual: patterns of slug/model/data -> fields of the cell. Tuned on the
# split dev; the page tells them in the cell's row.
TUNED: dict[str, dict[str, Any]] = {
    # the first that tells a field has it
    "ftrojan/blip2/easy-vqa": {"epochs": 6, "learning_rate": 2e-3},
    "dualkey/blip2/easy-vqa": {"epochs": 6, "learning_rate": 2e-3},
    "dualkey/qwen2_5_vl/easy-vqa": {"epochs": 6},
    "*/blip2/scenes-captions": {"epochs": 4},  # a Q-Former learns to spell a reply late
    "issba/*/*": {"epochs": 4},
    "ftrojan/*/*": {"epochs": 4},
    "dualkey/*/*": {"epochs": 4, "attack_settings": {"side": 0.15}},  # two keys at once take a plainer patch
    "wanet/*/*": {"epochs": 4, "attack_settings": {"s": 4.0}},
    "shadowcast/*/easy-vqa": {"rate": 0.04},  # it poisons rectangles alone, and there are no more
    "vlood/*/scenes-captions": {"attack_settings": {"source": "easy-vqa"}},  # not a set of scenes for scenes
}


class Key(NamedTuple):
    """Which cell of the gallery: ``attack`` is the entry's slug; of an oracle ``oracle``, or ``oracle-SLUG``."""

    attack: str
    model: str
    data: str


Plan = dict[Key, Cell]


def plan(models: Sequence[str], entries: Sequence[Entry] = ENTRIES, split: Split | None = None) -> Plan:
    """The undefended cell of every entry, model and task, and their oracles; on ``report`` if not told otherwise.

    An oracle is trained once for all attacks of a model and a task that have the same training, without the rows
    that the first of them poisons, and asked with each: what it answers as the attacker wants is the floor of that
    attack's success rate.
    """
    split = split or Split()
    cells: Plan = {}
    together: dict[str, list[Key]] = {}
    for entry, model, data in product(entries, models, TASKS):
        key = Key(entry.slug, model, data)
        tuned = dict(ChainMap(*(of for pattern, of in TUNED.items() if fnmatchcase("/".join(key), pattern))))
        changed = tuned.pop("attack_settings", {})
        cell = Cell(model, data, entry.attack, "", split=split.name, seed=split.run_seed(0))
        cells[key] = attacked(cell, {**entry.settings, **changed}, **tuned)
        together.setdefault(_training(cells[key]), []).append(key)
    for first, *others in together.values():
        name = ORACLE if first._replace(attack=ORACLE) not in cells else f"{ORACLE}-{first.attack}"
        probes = {key.attack: _probe(cells[key]) for key in others}
        cells[first._replace(attack=name)] = replace(cells[first], defense=ORACLE, probes=probes)
    return cells


def oracle_of(cells: Plan, key: Key) -> Key:
    """The oracle with the same training as a cell."""
    wanted = _training(cells[key])
    return next(other for other, cell in cells.items() if cell.defense == ORACLE and _training(cell) == wanted)


def _probe(cell: Cell) -> dict[str, Any]:
    return {"attack": cell.attack, "goal": cell.goal, "settings": cell.attack_settings}


def _training(cell: Cell) -> str:
    """What two cells have in common that are trained in the same way on the same clean rows."""
    return replace(cell, attack="", attack_settings={}, goal="", defense="", probes={}).name


def chosen(cells: Plan, patterns: Sequence[str]) -> Plan:
    """The cells that match one of the patterns ``ATTACK/MODEL/DATA``; each part may be ``*`` or left out.

    Raises:
        InputError: a pattern matches no cell.
    """
    kept: set[Key] = set()
    for pattern in patterns:
        parts = [part or "*" for part in f"{pattern}//".split("/")]
        found = {key for key in cells if all(map(fnmatchcase, key, parts))}
        if not found:
            known = "; ".join(", ".join(dict.fromkeys(names)) for names in zip(*cells, strict=True))
            raise InputError(f"--only {pattern}: matches no cell; write ATTACK/MODEL/DATA with parts of: {known}")
        kept |= found
    return {key: cell for key, cell in cells.items() if key in kept or not patterns}


def summary(trigger: Trigger) -> str:
    """What the trigger's file says it is."""
    return _paragraphs(trigger)[0]


def source(trigger: Trigger) -> str:
    """What the trigger's file says of where it comes from, and where it departs from that; may be empty."""
    return next((part for part in _paragraphs(trigger) if part.startswith("Source:")), "")


def _paragraphs(trigger: Trigger) -> list[str]:
    text = sys.modules[type(trigger).__module__].__doc__ or ""
    return [" ".join(part.split()) for part in text.split("\n\n")]

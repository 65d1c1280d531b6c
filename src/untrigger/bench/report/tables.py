"""The report's tables: attacks by model and task, seeds together, and what the cells that count come to."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any, NamedTuple, cast

from untrigger.attacks import load_trigger
from untrigger.bench.report.figures import Attacked, Report, as_rate, number, shown
from untrigger.bench.store import ORACLE, Cell
from untrigger.bench.validity import FLOOR
from untrigger.data import Split
from untrigger.errors import InputError
from untrigger.metrics.rates import Rate

TASKS = {"vqa": "VQA", "captions": "captions"}
DETECTION = {  # what a detection tells -> its name
    "auroc": "AUROC",
    "recall_at_1": "recall at 1 % false positives",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "false_positives": "false positives",
}
HISTOGRAMS = 6  # views of cells that are drawn
_OWN_COLUMN = (
    *("model", "data", "attack", "goal", "defense", "defense_settings", "probes", "seed", "split"),
    *("attack_settings", "tuning"),
)
_ELSEWHERE = ("model", "data", "attack", "rate", "seed", "defense", "defense_settings", "probes")


class Spread(NamedTuple):
    """A figure over ``n`` cells."""

    median: float
    low: float
    high: float
    n: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return Spread(median(known), min(known), max(known), len(known)) if known else None


# --- the matrix ------------------------------------------------------------------------------------


class Pooled(NamedTuple):
    """An ASR over seeds, all their rows together; ``low`` and ``high`` are the lowest and the highest seed's."""

    rate: Rate
    valid: bool | None
    groups: Sequence[Attacked]
    low: float
    high: float


class Row(NamedTuple):
    """One attack on one model and task, by seed."""

    label: str
    groups: Sequence[Attacked]

    @property
    def told(self) -> str:
        """Which of its seeds do not count, and why; empty where all do."""
        if len(self.groups) == 1:
            return self.groups[0].told
        return "; ".join(f"seed {group.cell.seed} {group.told}" for group in self.groups if group.told)

    def pooled(self, defense: str) -> Pooled | None:
        """Over the seeds that count; where none does over those not checked, else over those that do not count."""
        had = [group for group in self.groups if defense in group.found]
        for valid in (True, None, False):
            if groups := [group for group in had if group.valid is valid]:
                rates = [group.asr(defense) for group in groups]
                hits, rows = sum(round(rate.value * rate.n) for rate in rates), sum(rate.n for rate in rates)
                values = [rate.value for rate in rates]
                return Pooled(Rate.from_counts(hits, rows), valid, groups, min(values), max(values))
        return None


class Block(NamedTuple):
    """All attacks on one model and task."""

    title: str
    rows: Sequence[Row]

    @property
    def groups(self) -> list[Attacked]:
        return [group for row in self.rows for group in row.groups]


def blocks(report: Report) -> list[Block]:
    """Every attacked model, its seeds in one row."""
    several = len({group.cell.rate for group in report.groups}) > 1
    rows: dict[tuple[str, str], dict[str, list[Attacked]]] = defaultdict(lambda: defaultdict(list))
    for group in report.groups:
        seedless = replace(group.cell, seed=Split(group.cell.split).seeds[0])
        rows[group.cell.model, group.cell.data][seedless.name].append(group)
    return [_block(list(of.values()), several) for of in rows.values()]


def settings_of(cell: Cell) -> dict[str, Any]:
    """Settings of attack and training in one, but for those that every table has a place for."""
    told = {name: value for name, value in asdict(cell).items() if name not in _ELSEWHERE}
    return told.pop("attack_settings") | told.pop("tuning") | told


def unusual(cell: Cell) -> str:
    """The settings of attack and training that are not at their defaults, in words."""
    try:
        usual = asdict(cast(Any, load_trigger(cell.attack)))
    except InputError:  # a trigger's file that is not here
        usual = {}
    changed = {name: value for name, value in cell.attack_settings.items() if usual.get(name) != value}
    changed |= dict(cell.tuning) | {name: value for name, value in cell.changed.items() if name not in _OWN_COLUMN}
    return ", ".join(f"{name} {number(value)}" for name, value in changed.items()) or "usual"


def _block(rows: Sequence[Sequence[Attacked]], several_rates: bool) -> Block:
    cells, first = [of[0].cell for of in rows], rows[0][0]
    made = [
        Row(
            shown(cell.attack)
            + (f", {100 * cell.rate:g} %" if several_rates else "")
            + _apart(cell, [other for other in cells if other.attack == cell.attack]),
            of,
        )
        for cell, of in zip(cells, rows, strict=True)
    ]
    return Block(f"{shown(first.cell.model)}, {first.cell.data} ({TASKS[first.task]})", made)


def _apart(cell: Cell, others: Sequence[Cell]) -> str:
    """In what a cell differs from others of its attack."""
    own, theirs = settings_of(cell), [settings_of(other) for other in others]
    return "".join(f", {name} {number(own[name])}" for name in own if any(of.get(name) != own[name] for of in theirs))


# --- over the cells that count ---------------------------------------------------------------------


class Standing(NamedTuple):
    """A defense over the cells that count.

    Attributes:
        above: ASR above the oracle's.
        kept: share of the oracle's quality.
        near: in how many cells the ASR is as low as an oracle's must be (`untrigger.bench.validity.FLOOR`).
    """

    defense: str
    asr: Spread
    above: Spread | None
    kept: Spread | None
    leak: Spread | None
    near: int


def standings(groups: Sequence[Attacked], defenses: Sequence[str]) -> list[Standing]:
    """Each defense over the groups that count; one that was run in none of them is left out."""
    return [
        Standing(
            name,
            asr,
            spread(group.above(name) for group in had),
            spread(group.kept(name) for group in had),
            spread(leak["value"] if (leak := group.found[name].metrics.get("leak")) else None for group in had),
            sum(group.asr(name).value <= FLOOR for group in had),
        )
        for name in defenses
        if (had := [group for group in groups if group.valid and name in group.found])
        and (asr := spread(group.asr(name).value for group in had))
    ]


class Sight(NamedTuple):
    """Exact answers of the oracle, of guessing from the question alone, and of the oracle with a wrong image."""

    title: str
    oracle: Spread
    prior: Spread
    blind: Spread | None


def sights(of: Sequence[Block]) -> list[Sight]:
    """Whether the models look at the image: where they do not, they can show nothing."""
    told: list[Sight] = []
    for block in of:
        oracles = [group.found[ORACLE].metrics for group in block.groups if ORACLE in group.found]
        exact = spread(metrics["quality"]["vqa_accuracy"]["value"] for metrics in oracles)
        prior, blind = (
            spread(figure["value"] if (figure := metrics.get(name)) else None for metrics in oracles)
            for name in ("text_prior", "wrong_image")
        )
        if exact and prior:
            told.append(Sight(block.title, exact, prior, blind))
    return told


class Cost(NamedTuple):
    """A defense's training in that of the undefended model of the same cell, and its seconds."""

    defense: str
    times: Spread
    seconds: Spread


def costs(report: Report) -> list[Cost]:
    """Over all cells, also those that do not count: they cost the same."""
    told: list[Cost] = []
    for name in report.defenses:
        run = [group for group in report.groups if name in group.found and group.owns(name)]
        had = [group for group in run if group.times(name) is not None]
        times, seconds = spread(group.times(name) for group in had), spread(group.seconds(name) for group in had)
        if times and seconds:
            told.append(Cost(name, times, seconds))
    return told


class Detection(NamedTuple):
    """What a defense that looks at rows told of them in one cell (`untrigger.metrics.detection`)."""

    group: Attacked
    defense: str
    figures: Mapping[str, Any]


def detections(report: Report) -> list[Detection]:
    return [
        Detection(group, name, figures)
        for group in report.groups
        for name in report.defenses
        if name in group.found and (figures := group.found[name].metrics.get("detection"))
    ]


class Detector(NamedTuple):
    """A defense that looks at rows, over the cells that count; its figures as in `Detection`."""

    defense: str
    cells: int
    figures: Mapping[str, Spread | None]


def detectors(found: Sequence[Detection]) -> list[Detector]:
    by_defense: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for each in found:
        if each.group.valid:
            by_defense[each.defense].append(each.figures)
    return [
        Detector(name, len(of), {figure: spread(_value(told.get(figure)) for told in of) for figure in DETECTION})
        for name, of in sorted(by_defense.items())
    ]


def _value(figure: Any) -> float | None:
    """Of a rate, or of a plain number; either may be unknown."""
    return figure["value"] if isinstance(figure, Mapping) else figure


# --- the premise -----------------------------------------------------------------------------------


class View(NamedTuple):
    """Training rows of one attacked model in one view: the AUROC of "the more invariant, the more poisoned".

    Attributes:
        edges: of the histograms of clean and of poisoned rows, nats.
    """

    group: Attacked
    name: str
    auroc: Rate
    edges: Sequence[float]
    clean: Sequence[int]
    poisoned: Sequence[int]

    @property
    def holds(self) -> bool | None:
        """True and False where the interval lies above or below one half, None where it does neither."""
        return True if self.auroc.low > 0.5 else False if self.auroc.high < 0.5 else None


def views(report: Report) -> list[View]:
    """Every view of every group whose undefended model was asked, in order."""
    return [
        View(group, name, as_rate(view["auroc"]), told["edges"], view["clean"], view["poisoned"])
        for group in report.groups
        if (told := group.premise)
        for name, view in told["views"].items()
    ]


def chosen(told: Sequence[View]) -> list[View]:
    """A few of those that count, evenly spaced from the highest AUROC to the lowest."""
    counted = [view for view in told if view.group.valid]
    ranked = sorted(counted, key=lambda view: (-view.auroc.value, view.group.anchor, view.name))
    last, shown_ = len(ranked) - 1, min(HISTOGRAMS, len(ranked))
    return [ranked[round(i * last / max(1, shown_ - 1))] for i in range(shown_)]


# --- what it was made with -------------------------------------------------------------------------


def environment(report: Report) -> list[tuple[str, list[str]]]:
    """Versions, machines and what the cells have in common, each with the number of its cells."""
    cells, metrics = [result.cell for result in report.results], [result.metrics for result in report.results]
    told: dict[str, Iterable[str]] = {
        "versions": (", ".join(f"{name} {of}" for name, of in m.get("versions", {}).items()) for m in metrics),
        "machine": (_machine(m.get("machine", {})) for m in metrics),
        "split": (cell.split for cell in cells),
        "seed": (str(cell.seed) for cell in cells),
        "poison rate": (f"{100 * cell.rate:g} %" for cell in cells),
        "rows": (f"{c.train_rows:,} to train on, {c.test_rows:,} to ask, {c.clean_rows:,} trusted" for c in cells),
        "training": map(_training, cells),
    }
    return [(name, [_counted(*each) for each in sorted(Counter(of).items())]) for name, of in told.items()]


def _training(c: Cell) -> str:
    told = f"{c.epochs:g} epochs, batch {c.batch_size}, learning rate {c.learning_rate:g}"
    return told if c.precision == "fp32" else f"{told}, {c.precision}"


def _machine(machine: Mapping[str, Any]) -> str:
    threads = machine.get("threads")
    return f"{machine.get('device', 'not told')}" + (f", {threads} thread{'s' * (threads != 1)}" if threads else "")


def _counted(what: str, cells: int) -> str:
    return f"{what or 'not told'}: {cells:,} cell{'s' * (cells != 1)}"

"""The report's tables: attacks by model and task with seeds pooled, and medians over the cells that count."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any, NamedTuple, cast

from untrigger.attacks import load_trigger
from untrigger.bench.report.figures import AttackGroup, Report, as_rate, number, short_name
from untrigger.bench.store import ORACLE, Cell
from untrigger.bench.validity import FLOOR
from untrigger.data import USUAL_METRIC, Split
from untrigger.errors import InputError
from untrigger.metrics.rates import Rate

TASKS = {"vqa": "VQA", "captions": "captions"}
DETECTION = {  # field of untrigger.metrics.detection -> title of its column
    "auroc": "AUROC",
    "recall_at_1": "recall at 1 % false positives",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "false_positives": "false positives",
}
HISTOGRAMS = 6  # number of views with a histogram
_OWN_COLUMN = (
    *("model", "data", "attack", "goal", "defense", "defense_settings", "probes", "seed", "split"),
    *("attack_settings", "tuning", "own_data", "arguments"),
)
_IN_OTHER_PLACES = ("model", "data", "own_data", "attack", "rate", "seed", "defense", "defense_settings", "probes")


class Spread(NamedTuple):
    """Median and range of a figure over ``n`` cells."""

    median: float
    low: float
    high: float
    n: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Median and range of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return Spread(median(known), min(known), max(known), len(known)) if known else None


# --- attack success --------------------------------------------------------------------------------


class Pooled(NamedTuple):
    """An ASR over the rows of several seeds; ``low`` and ``high`` are the lowest and the highest seed's."""

    rate: Rate
    valid: bool | None
    groups: Sequence[AttackGroup]
    low: float
    high: float


class Row(NamedTuple):
    """One attack on one model and task, by seed."""

    label: str
    groups: Sequence[AttackGroup]

    @property
    def status(self) -> str:
        """Which seeds do not count, and why; empty if all count."""
        if len(self.groups) == 1:
            return self.groups[0].status
        return "; ".join(f"seed {group.cell.seed} {group.status}" for group in self.groups if group.status)

    def pooled(self, defense: str) -> Pooled | None:
        """Pool the seeds that count; if none does, those not checked, or else those that do not count."""
        run = [group for group in self.groups if defense in group.results]
        for valid in (True, None, False):
            if groups := [group for group in run if group.valid is valid]:
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
    def groups(self) -> list[AttackGroup]:
        return [group for row in self.rows for group in row.groups]


def blocks(report: Report) -> list[Block]:
    """Every attacked model, with its seeds in one row."""
    several = len({group.cell.rate for group in report.groups}) > 1
    rows: dict[tuple[str, str], dict[str, list[AttackGroup]]] = defaultdict(lambda: defaultdict(list))
    for group in report.groups:
        seedless = replace(group.cell, seed=Split(group.cell.split).seeds[0])
        rows[group.cell.model, group.cell.data][seedless.name].append(group)
    return [_block(list(groups.values()), several) for groups in rows.values()]


def settings_of(cell: Cell) -> dict[str, Any]:
    """Settings of the attack and the training, without those that have their own place in every table."""
    settings = {name: value for name, value in asdict(cell).items() if name not in _IN_OTHER_PLACES}
    return settings.pop("attack_settings") | settings.pop("tuning") | settings.pop("arguments") | settings


def changed_settings(cell: Cell) -> str:
    """The settings of the attack and the training that differ from their defaults, in words."""
    try:
        defaults = asdict(cast(Any, load_trigger(cell.attack)))
    except InputError:  # the trigger's file is not on this machine
        defaults = {}
    changed = {name: value for name, value in cell.attack_settings.items() if defaults.get(name) != value}
    changed |= {**cell.tuning, **cell.arguments}
    changed |= {name: value for name, value in cell.changed.items() if name not in _OWN_COLUMN}
    return ", ".join(f"{name} {number(value)}" for name, value in changed.items()) or "defaults"


def _block(rows: Sequence[Sequence[AttackGroup]], several_rates: bool) -> Block:
    cells, first = [groups[0].cell for groups in rows], rows[0][0]
    labeled = [
        Row(
            short_name(cell.attack)
            + (f", {100 * cell.rate:g} %" if several_rates else "")
            + _difference(cell, [other for other in cells if other.attack == cell.attack]),
            groups,
        )
        for cell, groups in zip(cells, rows, strict=True)
    ]
    usual = first.cell.metric == USUAL_METRIC[first.task]
    task = TASKS[first.task] + ("" if usual else f", quality is {first.cell.metric}")
    return Block(f"{short_name(first.cell.model)}, {first.cell.data} ({task})", labeled)


def _difference(cell: Cell, cells: Sequence[Cell]) -> str:
    """The settings in which a cell differs from the cells of its attack."""
    own, all_settings = settings_of(cell), [settings_of(other) for other in cells]
    names = [name for name in own if any(settings.get(name) != own[name] for settings in all_settings)]
    return "".join(f", {name} {number(own[name])}" for name in names)


# --- over the cells that count ---------------------------------------------------------------------


class Standing(NamedTuple):
    """The figures of a defense over the cells that count.

    Attributes:
        above_oracle: ASR minus the oracle's.
        quality_share: quality as a share of the oracle's.
        at_floor: number of cells whose ASR is at most `untrigger.bench.validity.FLOOR`, the bound of an oracle.
    """

    defense: str
    asr: Spread
    above_oracle: Spread | None
    quality_share: Spread | None
    leak: Spread | None
    at_floor: int


def standings(groups: Sequence[AttackGroup], defenses: Sequence[str]) -> list[Standing]:
    """Each defense over the groups that count; a defense that was not run in any of them is left out."""
    return [
        Standing(
            name,
            asr,
            spread(group.asr_above_oracle(name) for group in counted),
            spread(group.quality_share(name) for group in counted),
            spread(leak["value"] if (leak := group.results[name].metrics.get("leak")) else None for group in counted),
            sum(group.asr(name).value <= FLOOR for group in counted),
        )
        for name in defenses
        if (counted := [group for group in groups if group.valid and name in group.results])
        and (asr := spread(group.asr(name).value for group in counted))
    ]


class Beyond(NamedTuple):
    """How much an attack whose replies vary gains over the oracle; None where that is not known, by defense."""

    title: str
    label: str
    group: AttackGroup
    differences: Sequence[Rate | None]


def beyond(all_blocks: Sequence[Block], defenses: Sequence[str]) -> list[Beyond]:
    """A row for each group whose goal has more than one reply and whose oracle was run."""
    rows: list[Beyond] = []
    for block in all_blocks:
        for label, group in ((row.label, group) for row in block.rows for group in row.groups):
            differences = [group.beyond_oracle(name) if name in group.results else None for name in defenses]
            if any(differences):
                rows.append(Beyond(block.title, label, group, differences))
    return rows


class ImageUse(NamedTuple):
    """Accuracies that show whether the models of a block use the image.

    Attributes:
        oracle: with the right image.
        text_prior: of guesses from the question alone.
        wrong_image: of the oracle with the image of another row.
    """

    title: str
    oracle: Spread
    text_prior: Spread
    wrong_image: Spread | None


def image_uses(all_blocks: Sequence[Block]) -> list[ImageUse]:
    """The image use of each block with an oracle. A model that ignores the image shows nothing about attacks on it."""
    uses: list[ImageUse] = []
    for block in all_blocks:
        oracles = [group.results[ORACLE].metrics for group in block.groups if ORACLE in group.results]
        exact = spread(metrics["quality"]["vqa_accuracy"]["value"] for metrics in oracles)
        prior, wrong_image = (
            spread(figure["value"] if (figure := metrics.get(name)) else None for metrics in oracles)
            for name in ("text_prior", "wrong_image")
        )
        if exact and prior:
            uses.append(ImageUse(block.title, exact, prior, wrong_image))
    return uses


class Cost(NamedTuple):
    """The training time of a defense: over that of the undefended model of the same cell, and in seconds."""

    defense: str
    time_ratio: Spread
    seconds: Spread


def costs(report: Report) -> list[Cost]:
    """The cost of each defense over all cells: those that do not count cost the same."""
    rows: list[Cost] = []
    for name in report.defenses:
        run = [group for group in report.groups if name in group.results and group.owns(name)]
        compared = [group for group in run if group.time_ratio(name) is not None]
        ratio = spread(group.time_ratio(name) for group in compared)
        seconds = spread(group.seconds(name) for group in compared)
        if ratio and seconds:
            rows.append(Cost(name, ratio, seconds))
    return rows


class Detection(NamedTuple):
    """The row scores of a defense in one cell, measured (`untrigger.metrics.detection`)."""

    group: AttackGroup
    defense: str
    figures: Mapping[str, Any]


def detections(report: Report) -> list[Detection]:
    return [
        Detection(group, name, figures)
        for group in report.groups
        for name in report.defenses
        if name in group.results and (figures := group.results[name].metrics.get("detection"))
    ]


class Detector(NamedTuple):
    """A defense that scores rows, over the cells that count; figures as in `Detection`."""

    defense: str
    cells: int
    figures: Mapping[str, Spread | None]


def detectors(measured: Sequence[Detection]) -> list[Detector]:
    by_defense: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for detection in measured:
        if detection.group.valid:
            by_defense[detection.defense].append(detection.figures)
    return [
        Detector(name, len(cells), {field: spread(_value(cell.get(field)) for cell in cells) for field in DETECTION})
        for name, cells in sorted(by_defense.items())
    ]


def _value(figure: Any) -> float | None:
    """The value of a rate or of a plain number; None if it is unknown."""
    return figure["value"] if isinstance(figure, Mapping) else figure


# --- the premise -----------------------------------------------------------------------------------


class View(NamedTuple):
    """Training rows of one attacked model in one view.

    Attributes:
        auroc: of the invariance of a row's answer as a score for "poisoned".
        edges: of the bins, Jensen-Shannon divergence in nats.
        clean, poisoned: counts of rows by bin.
    """

    group: AttackGroup
    name: str
    auroc: Rate
    edges: Sequence[float]
    clean: Sequence[int]
    poisoned: Sequence[int]

    @property
    def holds(self) -> bool | None:
        """True if the interval is above 0.5, False if it is below, None if it includes 0.5."""
        return True if self.auroc.low > 0.5 else False if self.auroc.high < 0.5 else None


def views(report: Report) -> list[View]:
    """Every view of every group whose undefended model has these figures, in order."""
    return [
        View(group, name, as_rate(view["auroc"]), premise["edges"], view["clean"], view["poisoned"])
        for group in report.groups
        if (premise := group.premise)
        for name, view in premise["views"].items()
    ]


def select_views(all_views: Sequence[View]) -> list[View]:
    """A few views of cells that count, evenly spaced from the highest AUROC to the lowest."""
    counted = [view for view in all_views if view.group.valid]
    ranked = sorted(counted, key=lambda view: (-view.auroc.value, view.group.anchor, view.name))
    last, count = len(ranked) - 1, min(HISTOGRAMS, len(ranked))
    return [ranked[round(i * last / max(1, count - 1))] for i in range(count)]


# --- environment -----------------------------------------------------------------------------------


def environment(report: Report) -> list[tuple[str, list[str]]]:
    """Versions, machines and settings, each value with the number of its cells."""
    cells, metrics = [result.cell for result in report.results], [result.metrics for result in report.results]
    values: dict[str, Iterable[str]] = {
        "versions": (
            ", ".join(f"{name} {version}" for name, version in m.get("versions", {}).items()) for m in metrics
        ),
        "machine": (_machine(m.get("machine", {})) for m in metrics),
        "split": (cell.split for cell in cells),
        "seed": (str(cell.seed) for cell in cells),
        "poison rate": (f"{100 * cell.rate:g} %" for cell in cells),
        "rows": (f"{c.train_rows:,} to train on, {c.test_rows:,} to test, {c.clean_rows:,} clean" for c in cells),
        "training": map(_training, cells),
    }
    return [(name, [_counted(*item) for item in sorted(Counter(texts).items())]) for name, texts in values.items()]


def _training(c: Cell) -> str:
    text = f"{c.epochs:g} epochs, batch {c.batch_size}, learning rate {c.learning_rate:g}"
    return text if c.precision == "fp32" else f"{text}, {c.precision}"


def _machine(machine: Mapping[str, Any]) -> str:
    threads = machine.get("threads")
    return f"{machine.get('device', 'unknown')}" + (f", {threads} thread{'s' * (threads != 1)}" if threads else "")


def _counted(text: str, cells: int) -> str:
    return f"{text or 'unknown'}: {cells:,} cell{'s' * (cells != 1)}"

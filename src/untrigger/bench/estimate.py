"""Estimate what a plan will cost: from finished cells, counted operations, and a rough table for bundled models."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median

from untrigger.bench import store
from untrigger.bench.flops import ANSWERS_PER_TEST_ROW, IMAGE, RATES, RATES_TEXT, Size, counted_size, flops, memory
from untrigger.bench.store import ORACLE, Cell, Result
from untrigger.bench.sweep import missing_data, missing_models, unfinished
from untrigger.errors import InputError
from untrigger.models.loading import embedded_models, why_not_a_model

# Seconds on one core with the embedded models: for a row in one pass of plain training, and for one answer.
# Rough figures, which are used only until some cells of the plan are finished.
_SECONDS_PER_ROW, _SECONDS_PER_ANSWER = 0.01, {"vqa": 0.02, "captions": 0.06}
# Training time of a defense as a multiple of plain training. The defenses of the second table start from the
# undefended model, whose training other cells share.
_TRAINING_RATIO = {"default": 2.0, "words": 1.3, "two-view": 2.0, "paper": 2.1, "byorn": 1.6, "bye": 1.1, "abl": 1.1}
_REPAIR_RATIO = {"crow": 0.3, "clean-tuning": 0.1, "fine-pruning": 0.2}


def dry_run_text(cells: Sequence[Cell], root: Path, jobs: int, stated: Mapping[str, Size] | None = None) -> str:
    """The lines of a dry run: how many cells are finished and missing, and how long the missing ones will take.

    Args:
        stated: by model, sizes that the plan states (`untrigger.bench.flops`); other models but the bundled ones are
            counted from their config.json. One that cannot be read is named as not counted.
    """
    missing = unfinished(root, cells)
    lines = [f"{len(cells):,} cells, {len(cells) - len(missing):,} of them done, {len(missing):,} to run"]
    for title, value_of in _AXES.items():
        counts = Counter(map(value_of, cells))
        lines.append(f"  {title}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    # warnings, not errors: models and data may be made before the plan is run
    warnings = [*missing_models(root, cells), *missing_data(root, cells)]
    sizes, uncounted = _sizes(missing, stated or {})
    finished = store.results(root)
    at_a_time = "1 cell" if jobs == 1 else f"{jobs:,} cells"
    bundled = [cell for cell in missing if cell.model in embedded_models()]
    if bundled or not (sizes or uncounted):
        seconds = estimate(bundled, finished)
        one_core, wall_clock = (timedelta(seconds=round(part)) for part in (seconds, seconds / jobs))
        lines.append(f"about {one_core} on one core; {wall_clock} with {at_a_time} at a time")
    if sizes:
        lines += _gpu_lines([cell for cell in missing if cell.model in sizes], finished, sizes, jobs)
    lines += [f"not counted: {reason}" for reason in uncounted]
    return "\n".join([*lines, *(f"warning: {reason}" for reason in warnings)])


def _sizes(cells: Sequence[Cell], stated: Mapping[str, Size]) -> tuple[dict[str, Size], list[str]]:
    """The sizes of the models of ``cells`` that are not bundled, and a line for each that cannot be counted."""
    sizes: dict[str, Size] = {}
    uncounted: list[str] = []
    for name in dict.fromkeys(cell.model for cell in cells if cell.model not in embedded_models()):
        if why_not_a_model(name):
            continue  # it has a warning of its own
        try:
            sizes[name] = stated[name] if name in stated else counted_size(name)
        except InputError as error:
            uncounted.append(str(error))
    return sizes, uncounted


def _gpu_lines(cells: Sequence[Cell], finished: Sequence[Result], sizes: Mapping[str, Size], jobs: int) -> list[str]:
    """GPU hours of all cells and of each model, with the memory that its largest cell needs."""
    hours = estimate(cells, finished, sizes) / 3600
    lines = [
        f"about {hours:,.3g} GPU hours at {RATES_TEXT}; {hours / jobs:,.3g} hours with {jobs:,} GPUs, a cell on each"
    ]
    for name, size in sizes.items():
        own = [cell for cell in cells if cell.model == name]
        need = max(memory(cell, size) for cell in own) / 2**30
        lines.append(
            f"  {name}: {len(own):,} cells, {estimate(own, finished, sizes) / 3600:,.3g} GPU hours, {need:,.3g} GiB of "
            f"memory; {size.image_tokens:,} tokens for an image of {IMAGE[0]} x {IMAGE[1]}"
        )
    return lines


_AXES: Mapping[str, Callable[[Cell], object]] = {
    "models": lambda cell: cell.model,
    "data": lambda cell: cell.data,
    "attacks": lambda cell: cell.attack,
    "defenses": lambda cell: cell.defense,
    "rates": lambda cell: cell.rate,
    "seeds": lambda cell: cell.seed,
}


def estimate(missing: Iterable[Cell], finished: Iterable[Result], sizes: Mapping[str, Size] | None = None) -> float:
    """Seconds that the missing cells will take: of one core, or of a GPU for models with a size.

    Each rough figure is scaled by the median ratio of measured to rough seconds: of finished cells with the same model,
    data and defense, or of all finished cells where there are none.
    """
    sizes = sizes or {}
    measured: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for cell, metrics in finished:
        if sizes and cell.model not in sizes:
            continue  # a core's seconds say nothing about a GPU's
        spent = metrics["seconds"]["training"] + metrics["seconds"]["asking"]
        measured[cell.model, cell.data, cell.defense].append(spent / _rough_seconds(cell, sizes))
    all_ratios = [ratio for ratios in measured.values() for ratio in ratios]
    default_ratio = median(all_ratios) if all_ratios else 1.0
    trained_oracles: set[str] = set()
    total = 0.0
    for cell in missing:
        ratios = measured.get((cell.model, cell.data, cell.defense))
        total += _rough_seconds(cell, sizes, trained_oracles) * (median(ratios) if ratios else default_ratio)
    return total


def _rough_seconds(cell: Cell, sizes: Mapping[str, Size], trained_oracles: set[str] | None = None) -> float:
    """Seconds by counted operations or by the table; an oracle that an earlier cell trains is not trained again."""
    if size := sizes.get(cell.model):
        answering = flops(cell, size, trained=False) / RATES[cell.precision]
        training = flops(cell, size) / RATES[cell.precision] - answering
    else:
        training = _SECONDS_PER_ROW * cell.train_rows * cell.epochs
        answering = _SECONDS_PER_ANSWER[cell.task] * cell.test_rows * ANSWERS_PER_TEST_ROW
    if cell.defense == ORACLE and trained_oracles is not None:
        rows = cell.data, cell.seed, cell.rate, cell.train_rows
        fitting = cell.epochs, cell.batch_size, cell.learning_rate, cell.precision, cell.tuning, cell.arguments
        key = str((cell.model, rows, fitting))
        training *= key not in trained_oracles
        trained_oracles.add(key)
    return training * _TRAINING_RATIO.get(cell.defense, _REPAIR_RATIO.get(cell.defense, 1.0)) + answering

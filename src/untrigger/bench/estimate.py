"""Estimate what a plan will cost: from finished cells, and from a rough table where there are none."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median

from untrigger.bench import store
from untrigger.bench.store import ORACLE, Cell, Result
from untrigger.bench.sweep import missing_models, unfinished
from untrigger.data import task_of

# Seconds on one core with the embedded models: for a row in one pass of plain training, and for one answer.
# Rough figures, which are used only until some cells of the plan are finished.
_SECONDS_PER_ROW, _SECONDS_PER_ANSWER = 0.01, {"vqa": 0.02, "captions": 0.06}
_ANSWERS_PER_TEST_ROW = 4  # clean, triggered, near misses
# Training time of a defense as a multiple of plain training. The defenses of the second table start from the
# undefended model, whose training other cells share.
_TRAINING_RATIO = {"default": 2.0, "words": 1.3, "two-view": 2.0, "paper": 2.1, "byorn": 1.6, "bye": 1.1, "abl": 1.1}
_REPAIR_RATIO = {"crow": 0.3, "clean-tuning": 0.1, "fine-pruning": 0.2}


def dry_run_text(cells: Sequence[Cell], root: Path, jobs: int) -> str:
    """The lines of a dry run: how many cells are finished and missing, and how long the missing ones will take."""
    missing = unfinished(root, cells)
    seconds = estimate(missing, store.results(root))
    lines = [f"{len(cells):,} cells, {len(cells) - len(missing):,} of them done, {len(missing):,} to run"]
    for title, value_of in _AXES.items():
        counts = Counter(map(value_of, cells))
        lines.append(f"  {title}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    wall_clock = timedelta(seconds=round(seconds / jobs))
    at_a_time = "1 cell" if jobs == 1 else f"{jobs:,} cells"
    lines.append(f"about {timedelta(seconds=round(seconds))} on one core; {wall_clock} with {at_a_time} at a time")
    # a warning, not an error: the model may be made before the plan is run
    lines += [f"warning: {reason}" for reason in missing_models(root, cells)]
    return "\n".join(lines)


_AXES: Mapping[str, Callable[[Cell], object]] = {
    "models": lambda cell: cell.model,
    "data": lambda cell: cell.data,
    "attacks": lambda cell: cell.attack,
    "defenses": lambda cell: cell.defense,
    "rates": lambda cell: cell.rate,
    "seeds": lambda cell: cell.seed,
}


def estimate(missing: Iterable[Cell], finished: Iterable[Result]) -> float:
    """Seconds of one core that the missing cells will take.

    Each rough figure is scaled by the median ratio of measured to rough seconds: of finished cells with the same model,
    data and defense, or of all finished cells where there are none.
    """
    measured: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for cell, metrics in finished:
        spent = metrics["seconds"]["training"] + metrics["seconds"]["asking"]
        measured[cell.model, cell.data, cell.defense].append(spent / _rough_seconds(cell))
    all_ratios = [ratio for ratios in measured.values() for ratio in ratios]
    default_ratio = median(all_ratios) if all_ratios else 1.0
    trained_oracles: set[str] = set()
    total = 0.0
    for cell in missing:
        ratios = measured.get((cell.model, cell.data, cell.defense))
        total += _rough_seconds(cell, trained_oracles) * (median(ratios) if ratios else default_ratio)
    return total


def _rough_seconds(cell: Cell, trained_oracles: set[str] | None = None) -> float:
    """Seconds by the table; an oracle that an earlier cell trains is not trained again."""
    training = _SECONDS_PER_ROW * cell.train_rows * cell.epochs
    answering = _SECONDS_PER_ANSWER[task_of(cell.data)] * cell.test_rows * _ANSWERS_PER_TEST_ROW
    if cell.defense == ORACLE and trained_oracles is not None:
        rows = cell.data, cell.seed, cell.rate, cell.train_rows
        fitting = cell.epochs, cell.batch_size, cell.learning_rate, cell.precision, cell.tuning
        key = str((cell.model, rows, fitting))
        training *= key not in trained_oracles
        trained_oracles.add(key)
    return training * _TRAINING_RATIO.get(cell.defense, _REPAIR_RATIO.get(cell.defense, 1.0)) + answering

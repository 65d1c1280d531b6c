"""What a plan will cost: from cells that are done, and where there are none from a rough table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median

from untrigger.bench import store
from untrigger.bench.store import ORACLE, Cell, Result
from untrigger.bench.sweep import absent_models, unfinished
from untrigger.data import task_of

# Seconds of one core for a row in one pass of plain training, and for a question; of the embedded models. Rough: told
# only until cells of the plan are done.
_ROW, _QUESTION = 0.01, {"vqa": 0.02, "captions": 0.06}
_ASKED = 4  # times a test row is asked: clean, triggered, near misses
# Trainings of a defense in plain ones, beside the undefended model that those below go on from.
_TIMES = {"default": 1.3, "two-view": 2.0, "paper": 2.1, "byorn": 1.6, "bye": 1.1, "abl": 1.1}
_AFTER = {"crow": 0.3, "clean-tuning": 0.1, "fine-pruning": 0.2}


def told(cells: Sequence[Cell], root: Path, jobs: int) -> str:
    """How many cells there are, are done and are missing, and how long these will take."""
    missing = unfinished(root, cells)
    seconds = estimate(missing, store.results(root))
    lines = [f"{len(cells):,} cells, {len(cells) - len(missing):,} of them done, {len(missing):,} to run"]
    for title, of in _AXES.items():
        counts = Counter(map(of, cells))
        lines.append(f"  {title}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    clock = timedelta(seconds=round(seconds / jobs))
    lines.append(f"about {timedelta(seconds=round(seconds))} of one core; with {jobs} at a time done in {clock}")
    lines += [f"warning: {why}" for why in absent_models(root, cells)]  # it may be made before the plan is run
    return "\n".join(lines)


_AXES: Mapping[str, Callable[[Cell], object]] = {
    "models": lambda cell: cell.model,
    "data": lambda cell: cell.data,
    "attacks": lambda cell: cell.attack,
    "defenses": lambda cell: cell.defense,
    "rates": lambda cell: cell.rate,
    "seeds": lambda cell: cell.seed,
}


def estimate(missing: Iterable[Cell], done: Iterable[Result]) -> float:
    """Seconds of one core for the missing cells."""
    seen: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for cell, metrics in done:
        spent = metrics["seconds"]["training"] + metrics["seconds"]["asking"]
        seen[cell.model, cell.data, cell.defense].append(spent / _rough(cell))
    everything = [ratio for ratios in seen.values() for ratio in ratios]
    usual = median(everything) if everything else 1.0
    shared: set[str] = set()
    total = 0.0
    for cell in missing:
        ratios = seen.get((cell.model, cell.data, cell.defense))
        total += _rough(cell, shared) * (median(ratios) if ratios else usual)
    return total


def _rough(cell: Cell, shared: set[str] | None = None) -> float:
    """By the table; an oracle that the cells before have trained is not trained again."""
    training = _ROW * cell.train_rows * cell.epochs
    asking = _QUESTION[task_of(cell.data)] * cell.test_rows * _ASKED
    if cell.defense == ORACLE and shared is not None:
        rows = cell.data, cell.seed, cell.rate, cell.train_rows
        fitted = cell.epochs, cell.batch_size, cell.learning_rate, cell.precision, cell.tuning
        key = str((cell.model, rows, fitted))
        training *= key not in shared
        shared.add(key)
    return training * _TIMES.get(cell.defense, _AFTER.get(cell.defense, 1.0)) + asking

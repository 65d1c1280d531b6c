"""Run the missing cells of a plan and save them, on this machine's cores or on a cluster.

A run that is killed and started again loses only the cells in progress. The failure of a cell is recorded in one line
and does not stop the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from untrigger.bench import store
from untrigger.bench.local import Runner, Work, on_this_machine
from untrigger.bench.run_cell import run_cell
from untrigger.bench.store import Cell
from untrigger.errors import InputError
from untrigger.files import folder_lock
from untrigger.metrics.captions import check_libraries
from untrigger.models.loading import weights_sha256, why_not_a_model
from untrigger.progress import console, metered
from untrigger.rows.benchmarks import why_not_there


def run_matrix(cells: Sequence[Cell], root: Path, runner: Runner | None = None, work: Work = run_cell) -> list[str]:
    """Run the missing cells.

    Args:
        cells: the whole plan; cells that ``root`` already holds are not run.
        root: folder of results.
        runner: where cells run: `on_this_machine` (the default) or `untrigger.bench.ray_cluster.on_ray`.
        work: runs and saves one cell.

    Returns:
        A line for each failed cell: its name and the reason. The lines are printed too.

    Raises:
        InputError: the model or the data of a missing cell does not exist, another run is using ``root``, or the
            libraries of the caption scores are not installed.
    """
    check_libraries()
    if root == store.packed(root):
        raise InputError(
            f"{root}: is a file; give the folder {root.with_suffix('')}, cells of the file are not run again"
        )
    cells = list({cell.name: cell for cell in cells}.values())
    for axis, missing in (("models", missing_models(root, cells)), ("data", missing_data(root, cells))):
        if missing:
            raise InputError(f"{axis}: {missing[0]}")
    failed: list[str] = []
    root.mkdir(parents=True, exist_ok=True)
    with folder_lock(root), metered("cells", len(cells)) as meter:
        waiting = unfinished(root, cells)
        meter.start_at(len(cells) - len(waiting))
        for cell, reason in (runner or on_this_machine())(waiting, root, work):
            failed += [f"{cell.name}: {reason}"] if reason else []
            line = f"failed: {cell.name}: {reason}" if reason else f"{cell.name}: {_outcome(cell, root)}"
            console.print(line, soft_wrap=True, highlight=False, markup=False)
            meter.advance()
    return failed


def unfinished(root: Path, cells: Sequence[Cell]) -> list[Cell]:
    """Cells that are missing, and cells whose model has changed its weights since they were run."""
    missing = {cell.name for cell in store.missing(root, cells)}
    weights = {name: weights_sha256(name) for name in {cell.model for cell in cells if cell.name not in missing}}

    def is_current(cell: Cell) -> bool:
        stored, current = (store.find(root, cell) or {}).get("weights"), weights[cell.model]
        return not (stored and current) or stored == current  # older results and hub ids have no hash

    return [cell for cell in cells if cell.name in missing or not is_current(cell)]


def missing_models(root: Path, cells: Sequence[Cell]) -> list[str]:
    """A line for each model of a missing cell that does not exist. Finished cells no longer need their model."""
    names = dict.fromkeys(cell.model for cell in store.missing(root, cells))
    return [why for name in names if (why := why_not_a_model(name))]


def missing_data(root: Path, cells: Sequence[Cell]) -> list[str]:
    """A line for each file or folder of the user's own data that a missing cell needs and that does not exist."""
    names = dict.fromkeys(
        cell.own_data[part] for cell in store.missing(root, cells) if cell.own_data for part in ("train", "test")
    )
    return [why for name in names if (why := why_not_there(name))]


def _outcome(cell: Cell, root: Path) -> str:
    asr = (store.find(root, cell) or {}).get("asr")
    return f"ASR {asr['value']:.3f}" if asr else "done"

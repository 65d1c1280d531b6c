"""A matrix of cells: those that are missing are run and saved, on this machine's cores or on a cluster.

Killed at any moment and started again, it loses no more than the cells in flight. A cell that fails is recorded in
one line and stops no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from untrigger.bench import store
from untrigger.bench.local import Runner, Work, on_this_machine
from untrigger.bench.run_cell import run_cell
from untrigger.bench.store import Cell
from untrigger.errors import InputError
from untrigger.files import alone
from untrigger.models.loading import weights_sha256, why_not_a_model
from untrigger.progress import console, metered


def run_matrix(cells: Sequence[Cell], root: Path, runner: Runner | None = None, work: Work = run_cell) -> list[str]:
    """Run the missing cells; the ``runner`` says where (`on_this_machine`, `untrigger.bench.ray_cluster.on_ray`).

    Returns:
        A line for each cell that failed: its name and why. It was printed too.

    Raises:
        InputError: a missing cell's model is not there; another matrix is at work in ``root``.
    """
    if root == store.packed(root):
        raise InputError(f"{root}: is a file; give the folder {root.with_suffix('')}, what the file holds is done")
    cells = list({cell.name: cell for cell in cells}.values())
    if absent := absent_models(root, cells):
        raise InputError(f"models: {absent[0]}")
    failed: list[str] = []
    root.mkdir(parents=True, exist_ok=True)
    with folder_lock(root), metered("cells", len(cells)) as meter:
        todo = unfinished(root, cells)
        meter.start_at(len(cells) - len(todo))
        for cell, reason in (runner or on_this_machine())(todo, root, work):
            failed += [f"{cell.name}: {reason}"] if reason else []
            said = f"failed: {cell.name}: {reason}" if reason else f"{cell.name}: {_told(cell, root)}"
            console.print(said, soft_wrap=True, highlight=False, markup=False)
            meter.advance()
    return failed


def unfinished(root: Path, cells: Sequence[Cell]) -> list[Cell]:
    """Those that are missing, and those whose model has other weights than it had when they were run."""
    missing = {cell.name for cell in store.missing(root, cells)}
    weights = {name: weights_sha256(name) for name in {cell.model for cell in cells if cell.name not in missing}}

    def stands(cell: Cell) -> bool:
        kept, now = (store.find(root, cell) or {}).get("weights"), weights[cell.model]
        return not (kept and now) or kept == now  # a release that kept no hash, a hub id

    return [cell for cell in cells if cell.name in missing or not stands(cell)]


def absent_models(root: Path, cells: Sequence[Cell]) -> list[str]:
    """A line for each model that a missing cell names and that is not there; what is done needs its model no more."""
    names = dict.fromkeys(cell.model for cell in store.missing(root, cells))
    return [why for name in names if (why := why_not_a_model(name))]


def _told(cell: Cell, root: Path) -> str:
    asr = (store.find(root, cell) or {}).get("asr")
    return f"ASR {asr['value']:.3f}" if asr else "done"

"""Count the rows that a defense accuses in the cells of a plan, without the training that follows its verdict.

    python tests/stress/accusations.py plans/trouble.yaml --defense default --out accusations.jsonl

A minute a cell in the place of several. Only the counts read which rows are poisoned. Run it again to go on.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from untrigger.bench.plan import read_plan
from untrigger.bench.run_cell import arguments_of, defense_of, material_of
from untrigger.bench.store import Cell
from untrigger.defenses import Stage
from untrigger.models.loading import LoadedModel
from untrigger.training.schedule import clock
from untrigger.training.stages import Stages


class Verdict(Stages):
    """All stages but the last, which nobody asks for its model."""

    def fit(self, stage: Stage) -> LoadedModel:
        return super().fit(stage) if stage.name else stage.start or self.reference()


def main(
    plan: Annotated[
        Path, typer.Argument(help="The plan; each of its data sets, attacks, rates and seeds counts once.")
    ],
    out: Annotated[Path, typer.Option(help="File that gets a JSON line for each.")],
    defense: Annotated[str, typer.Option(help="The preset, in the place of the plan's.")] = "default",
) -> None:
    """Judge the rows of every cell that ``out`` does not hold."""
    done = {json.loads(line)["cell"] for line in out.read_text().splitlines()} if out.is_file() else set[str]()
    cells = [replace(cell, defense=defense, defense_settings={}, probes={}) for cell in read_plan(plan)]
    for cell in {cell.name: cell for cell in cells}.values():
        if cell.name not in done:
            counts = accused(cell)
            with out.open("a") as file:
                file.write(json.dumps({"cell": cell.name, **counts}) + "\n")
            Console().print(cell.name, counts)


def accused(cell: Cell) -> dict[str, int]:
    """How many rows the defense flags, how many are poisoned, how many are both, and the seconds that it took."""
    material, (defense, tuning) = material_of(cell), defense_of(cell)
    started = clock()
    with tempfile.TemporaryDirectory(prefix="untrigger-") as folder:
        stages = Verdict(cell.model, material.data, arguments_of(cell, Path(folder, "model")), tuning)
        defense.fine_tune(stages)
    poisoned = {entry.index for entry in material.poisoned.manifest.rows}
    both = len(poisoned.intersection(stages.flagged))
    return {
        "rows": len(material.data),
        "flagged": len(stages.flagged),
        "poisoned": len(poisoned),
        "both": both,
        "seconds": round(clock() - started),
    }


if __name__ == "__main__":
    typer.run(main)

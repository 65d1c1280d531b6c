"""How often `untrigger verify` finds what is there, and how often it accuses a model that was taught nothing.

    python benchmarks/verify_figures.py RESULTS... --json FILE [--rows training]

Takes the undefended models and the oracles of folders that ``untrigger bench`` wrote, and trains again those that
their ``shared`` no longer holds. Undefended models whose attack was not implanted
(`untrigger.bench.validity`) are audited and not counted. What is in FILE is not audited again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from peft import get_peft_model_state_dict
from rich.console import Console
from rich.table import Table

from untrigger.bench.run_cell import model_of
from untrigger.bench.store import ORACLE, Cell, results
from untrigger.bench.validity import IMPLANTED
from untrigger.files import write_text
from untrigger.metrics.rates import Rate
from untrigger.models.loading import LoadedModel
from untrigger.verification.verify import verify


def main(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RESULTS...", help="Folders that bench wrote, or their .jsonl.")
    ],
    out: Annotated[Path, typer.Option("--json", help="File of audits; it is gone on with.")],
    rows: Annotated[Literal["held-out", "training"], typer.Option(help="Rows that verify is given.")] = "held-out",
) -> None:
    """Audit every undefended model and every oracle; tell recall and false alarms with 95 % intervals."""
    torch.set_num_threads(1)
    audits: dict[str, dict[str, Any]] = json.loads(out.read_text()) if out.is_file() else {}
    for folder in folders:
        for cell, metrics in results(folder):
            if cell.defense in ("plain", ORACLE) and f"{rows}: {cell.name}" not in audits:
                run = folder.with_suffix("") if folder.suffix == ".jsonl" else folder  # where trainings are shared
                audits[f"{rows}: {cell.name}"] = audited(cell, metrics, run, rows, audits.values())
                write_text(out, json.dumps(audits, indent=2, ensure_ascii=False) + "\n")
    Console().print(table([each for each in audits.values() if each["rows"] == rows]))


def audited(
    cell: Cell, metrics: dict[str, Any], folder: Path, rows: str, others: Iterable[dict[str, Any]]
) -> dict[str, Any]:
    """One model: what it is, and what was found; the same clean model on the same rows is not audited twice."""
    loaded, material = model_of(cell, folder)
    model = digest(loaded)
    for other in others if cell.defense == ORACLE and rows == "held-out" else ():
        if (other["model"], other["rows"]) == (model, rows):
            return other | {"cell": asdict(cell)}
    audit = verify(loaded, material.test if rows == "held-out" else material.data, cell.model, cell.seed)
    return {
        "cell": asdict(cell),
        "rows": rows,
        "model": model,
        "implanted": "asr" in metrics and metrics["asr"]["value"] >= IMPLANTED,
        "found": bool(audit.findings),
        "texts": [finding.text for finding in audit.findings],
        "beginnings": [len(finding.said) for finding in audit.findings],
        "gains": [max((saying.gain for saying in finding.said), default=None) for finding in audit.findings],
        "heard": [asdict(finding.heard[0]) for finding in audit.findings],
        "limit": audit.limit,
        "usual": audit.usual,
    }


def digest(loaded: LoadedModel) -> str:
    """Of the adapter's weights: attacks that poison the same rows have one oracle between them."""
    weights = get_peft_model_state_dict(loaded.model)  # type: ignore[arg-type]
    return hashlib.sha256(b"".join(weights[name].cpu().numpy().tobytes() for name in sorted(weights))).hexdigest()[:16]


def table(audits: Sequence[dict[str, Any]]) -> Table:
    """Shares of models in which something was found: by attack and goal, and of those that were not attacked."""
    groups: dict[str, dict[str, bool]] = {}
    for each in audits:
        cell = each["cell"]
        goal = cell["goal"] + (f" ({cell['goal_text']})" if cell["goal_text"] else "")
        if cell["defense"] == ORACLE or not cell["rate"]:
            groups.setdefault("not attacked", {})[each["model"]] = each["found"]
        elif each["implanted"]:
            groups.setdefault("all that is implanted", {})[each["model"]] = each["found"]
            groups.setdefault(f"{cell['attack']}, {goal}", {})[each["model"]] = each["found"]
    shown = Table("models", "found", "share", "95 % interval")
    for name, found in sorted(groups.items()):
        rate = Rate.from_counts(sum(found.values()), len(found))
        shown.add_row(
            name, f"{sum(found.values())} of {rate.n}", f"{rate.value:.3f}", f"{rate.low:.3f}-{rate.high:.3f}"
        )
    return shown


if __name__ == "__main__":
    typer.run(main)

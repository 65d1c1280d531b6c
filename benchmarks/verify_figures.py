"""Measure the recall of `untrigger verify` on backdoored models, and its false alarms on others.

    python benchmarks/verify_figures.py RESULTS... --json FILE [--rows training]

Audits the undefended models and the oracles of folders that ``untrigger bench`` wrote; models that are no longer in
``shared`` are trained again. Undefended models whose attack was not implanted (`untrigger.bench.validity`) are audited
and not counted. Audits that FILE already holds are not run again.
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
    folders: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="Folders that bench wrote.")],
    out: Annotated[Path, typer.Option("--json", help="File of audits; new ones are added.")],
    rows: Annotated[Literal["held-out", "training"], typer.Option(help="Rows that verify is given.")] = "held-out",
) -> None:
    """Audit every undefended model and every oracle; print recall and false alarms with 95 % intervals."""
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
    """Audit one model; the same clean model on the same rows is not audited twice."""
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
        "suspicious": bool(audit.findings),
        "texts": [finding.text for finding in audit.findings],
        "beginnings": [len(finding.completions) for finding in audit.findings],
        "gains": [max((each.gain for each in finding.completions), default=None) for finding in audit.findings],
        "hits": [asdict(finding.hits[0]) for finding in audit.findings],
        "limit": audit.limit,
        "other_gain": audit.other_gain,
    }


def digest(loaded: LoadedModel) -> str:
    """A digest of the adapter's weights: attacks that poison the same rows share one oracle."""
    weights = get_peft_model_state_dict(loaded.model)  # type: ignore[arg-type]
    return hashlib.sha256(b"".join(weights[name].cpu().numpy().tobytes() for name in sorted(weights))).hexdigest()[:16]


def table(audits: Sequence[dict[str, Any]]) -> Table:
    """Shares of suspicious models: by attack and goal, and of those that were not attacked."""
    groups: dict[str, dict[str, bool]] = {}
    for each in audits:
        cell = each["cell"]
        goal = cell["goal"] + (f" ({cell['goal_text']})" if cell["goal_text"] else "")
        if cell["defense"] == ORACLE or not cell["rate"]:
            groups.setdefault("not attacked", {})[each["model"]] = each["suspicious"]
        elif each["implanted"]:
            groups.setdefault("all that is implanted", {})[each["model"]] = each["suspicious"]
            groups.setdefault(f"{cell['attack']}, {goal}", {})[each["model"]] = each["suspicious"]
    rates = Table("models", "suspicious", "share", "95 % interval")
    for name, models in sorted(groups.items()):
        rate = Rate.from_counts(sum(models.values()), len(models))
        rates.add_row(
            name, f"{sum(models.values())} of {rate.n}", f"{rate.value:.3f}", f"{rate.low:.3f}-{rate.high:.3f}"
        )
    return rates


if __name__ == "__main__":
    typer.run(main)

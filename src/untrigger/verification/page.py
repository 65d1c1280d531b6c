"""Write an audit's folder, ``audit.json`` for programs and ``audit.html`` for people, and its findings as lines."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from untrigger.files import write_text
from untrigger.html import style, templates
from untrigger.verification.verify import Audit, Finding

_ROWS = 8  # rows of a table on the page, at most


def write(audit: Audit, model: str, base: str, out: Path) -> None:
    """Write ``audit.json`` and ``audit.html``; the page loads nothing."""
    record = {"model": model, "base": base, "suspicious": bool(audit.findings), **asdict(audit)}
    write_text(out / "audit.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    page = templates(Path(__file__).parent).get_template("page.html.j2")
    write_text(out / "audit.html", page.render(audit=audit, model=model, base=base, style=style(), max_rows=_ROWS))


def describe(finding: Finding) -> str:
    """A finding in a line."""
    return f"{finding.text!r}: {'; '.join([*_completions(finding), *_hits(finding)])}"


def _completions(finding: Finding) -> list[str]:
    if not finding.completions:
        return []
    gain = max(completion.gain for completion in finding.completions)
    return [
        f"completed from {len(finding.completions)} beginnings whatever the input, {gain:.0f} nats likelier than in "
        "the base"
    ]


def _hits(finding: Finding) -> list[str]:
    hits = [hit for hit in finding.hits if hit.count]
    if not hits:
        return ["no perturbation of the input brought it out"]
    return [f"given unprompted with {hits[0].perturbation} ({hits[0].count} of {hits[0].rows} rows)"]

"""What an audit leaves in its folder: findings for programs, and a page for people that loads nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from untrigger.files import write_text
from untrigger.html import style, templates
from untrigger.verification.verify import Audit, Finding

_SHOWN = 8  # changes of a finding on the page


def write(audit: Audit, model: str, base: str, out: Path) -> None:
    """``audit.json`` and ``audit.html``."""
    told = {"model": model, "base": base, "suspicious": bool(audit.findings), **asdict(audit)}
    write_text(out / "audit.json", json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    page = templates(Path(__file__).parent).get_template("page.html.j2")
    write_text(out / "audit.html", page.render(audit=audit, model=model, base=base, style=style(), shown=_SHOWN))


def in_words(finding: Finding) -> str:
    """A finding in a line."""
    return f"{finding.text!r}: {'; '.join([*_begun(finding), *_heard(finding)])}"


def _begun(finding: Finding) -> list[str]:
    if not finding.said:
        return []
    gain = max(saying.gain for saying in finding.said)
    return [
        f"finished from {len(finding.said)} beginnings whatever is shown, {gain:.0f} nats likelier than in the base"
    ]


def _heard(finding: Finding) -> list[str]:
    told = [each for each in finding.heard if each.count]
    if not told:
        return ["no change of the input brought it out"]
    return [f"said by itself with {told[0].change} ({told[0].count} of {told[0].rows} rows)"]

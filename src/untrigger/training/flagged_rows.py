"""``flagged_rows.jsonl``: the rows that a defense flagged, with its reasons."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from untrigger.files import new_file
from untrigger.rows.storage import dump

FLAGGED_ROWS = "flagged_rows.jsonl"


@dataclass(frozen=True)
class FlaggedRow:
    """A flagged row.

    Fields:
        row: its number, from 1, as in the data file or the data set.
        id: its id, where it has one.
        score: how suspicious it is; higher is more.
        flagged_text: the flagged part of its answers, or why the defense flagged it.
        answers: all its answers, one for each turn.
    """

    row: int
    id: str | None
    score: float
    flagged_text: str
    answers: list[str]


def write_flagged_rows(folder: Path, rows: Iterable[FlaggedRow]) -> Path:
    """Write ``flagged_rows.jsonl`` into the folder, a line per row, the most suspicious first; return its path."""
    path = folder / FLAGGED_ROWS
    with new_file(path) as file:
        for row in sorted(rows, key=lambda row: -row.score):
            file.write(dump(asdict(row) | {"score": round(row.score, 4)}) + b"\n")
    return path

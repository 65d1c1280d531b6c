"""``flagged_rows.jsonl``: the rows that a defense flagged, with its reasons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from untrigger.files import new_file
from untrigger.rows.storage import dump
from untrigger.rows.turns import IMAGE_TAG

FLAGGED_ROWS = "flagged_rows.jsonl"


@dataclass(frozen=True)
class FlaggedRow:
    """A flagged row.

    Fields:
        row: its number, from 1, as in the data file or the data set.
        reordered: whether that is a host's data set, whose rows may be in another order than those of the data.
        id: its id, where it has one.
        images: the path of each image, or a hash of its pixels.
        prompts: the text before each answer.
        score: how suspicious it is; higher is more.
        flagged_text: the flagged part of its answers, or why the defense flagged it.
        answers: all its answers, one for each turn.
    """

    row: int
    reordered: bool
    id: str | None
    images: list[str]
    prompts: list[str]
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


def prompts_of(turns: Iterable[Mapping[str, Any]]) -> list[str]:
    """The text before each answer of a conversation, without images; several turns before one are lines of it.

    ``turns`` have ``role`` and ``content``: a text, or typed parts.
    """
    prompts, lines = list[str](), list[str]()
    for turn in turns:
        if turn["role"] == "assistant":
            prompts.append("\n".join(lines))
            lines = []
        elif text := _text(turn["content"]):
            lines.append(text)
    return prompts


def _text(content: Any) -> str:
    parts = [content] if isinstance(content, str) else [part.get("text") for part in content or ()]
    pieces = [piece.strip() for part in parts if part for piece in part.split(IMAGE_TAG)]
    return " ".join(piece for piece in pieces if piece)

"""Test rows of an attacked model for people to look at: pictures, and what the model says under each defense."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from untrigger.bench import store
from untrigger.bench.report.figures import Attacked
from untrigger.errors import InputError
from untrigger.metrics.score import Answer

_PICTURES = Path("shared", "examples")  # below the results, as untrigger.bench.run_cell keeps them
_PARTS = ("clean", "triggered")
_SHOWN = 6
_LONGEST = 300  # letters of an answer


class Said(NamedTuple):
    """What models say, each of them the same; None where it is not kept."""

    defenses: Sequence[str]
    clean: Answer | None
    triggered: Answer | None


class Example(NamedTuple):
    """One test row; ``clean`` and ``triggered`` are its pictures as data addresses, None where they are not kept."""

    id: str
    clean: str | None
    triggered: str | None
    said: Sequence[Said]

    @property
    def asked(self) -> Answer | None:
        return next((said.clean for said in self.said if said.clean), None)

    @property
    def asked_triggered(self) -> str:
        """The triggered question, where it is another than the clean one."""
        found = next((said.triggered.prompt for said in self.said if said.triggered), "")
        return found if self.asked and found != self.asked.prompt else ""


def examples(roots: Sequence[Path], group: Attacked, defenses: Sequence[str]) -> list[Example]:
    """The first triggered test rows of a group; none where neither pictures nor answers are kept.

    Raises:
        InputError: what is kept cannot be read.
    """
    had = [name for name in defenses if name in group.found and group.owns(name)]
    kept = {name: answers for name in had if (answers := _answers(roots, group, name))}
    folder = _folder(roots, group)
    ids = _ids(folder) if folder else list(next(iter(kept.values()), {}).get("triggered", {}))
    return [
        Example(
            row,
            _address(folder, f"{at}-clean.png"),
            _address(folder, f"{at}-triggered.png"),
            _said({name: [kept.get(name, {}).get(part, {}).get(row) for part in _PARTS] for name in had}),
        )
        for at, row in enumerate(ids[:_SHOWN])
    ]


def _said(answers: Mapping[str, Sequence[Answer | None]]) -> list[Said]:
    """By what is said, so that few lines show which models differ."""
    by_answers: dict[tuple[Answer | None, ...], list[str]] = {}
    for name, both in answers.items():
        by_answers.setdefault(tuple(both), []).append(name)
    return [Said(names, *both) for both, names in by_answers.items()]


def marked(answer: Answer, goal: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """The answer in parts, and which are the attacker's text; all of it where that is not found word for word."""
    text = answer.answer if len(answer.answer) <= _LONGEST else f"{answer.answer[:_LONGEST]} ..."
    if not answer.met:
        return [(text, False)]
    wanted = next((str(goal[name]) for name in ("text", "url", "target") if goal.get(name)), "")
    found = re.search(re.escape(wanted), text, re.IGNORECASE) if wanted else None
    start, end = found.span() if found else (0, len(text))
    return [part for part in ((text[:start], False), (text[start:end], True), (text[end:], False)) if part[0]]


def _answers(roots: Sequence[Path], group: Attacked, defense: str) -> dict[str, dict[str, Answer]] | None:
    cell = group.found[defense].cell
    root = next((root for root in roots if (store.folder_of(root, cell) / "answers.jsonl").is_file()), None)
    if root is None:
        return None
    kept = store.answers_of(root, cell)
    return {part: {answer.id: answer for answer in kept.get(part, ())} for part in _PARTS}


def _folder(roots: Sequence[Path], group: Attacked) -> Path | None:
    names = [name for result in group.found.values() if (name := result.metrics.get("examples"))]
    folders = (root / _PICTURES / name for root in roots for name in names)
    return next((folder for folder in folders if folder.is_dir()), None)


def _ids(folder: Path) -> list[str]:
    path = folder / "rows.json"
    try:
        return [str(row["id"]) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}); delete {folder}, pictures are made anew"
        ) from error


def _address(folder: Path | None, name: str) -> str | None:
    if folder is None or not (folder / name).is_file():
        return None
    return f"data:image/png;base64,{b64encode((folder / name).read_bytes()).decode()}"

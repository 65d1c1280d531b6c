"""Test rows of an attacked model: images, and the model's answers under each defense."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from untrigger.bench import store
from untrigger.bench.report.figures import AttackGroup
from untrigger.errors import InputError
from untrigger.metrics.score import Answer

_PICTURES = Path("shared", "examples")  # below the results; untrigger.bench.run_cell writes it
_PARTS = ("clean", "triggered")
_MOST_ROWS = 6
_MOST_LETTERS = 300  # of an answer


class ModelAnswers(NamedTuple):
    """The answers that models under some defenses have in common; None where an answer is not stored."""

    defenses: Sequence[str]
    clean: Answer | None
    triggered: Answer | None


class Example(NamedTuple):
    """One test row; ``clean`` and ``triggered`` are its images as data URLs, None where an image is not stored."""

    id: str
    clean: str | None
    triggered: str | None
    answers: Sequence[ModelAnswers]

    @property
    def clean_answer(self) -> Answer | None:
        """Any model's answer to the clean row: it holds the prompt and the true answer."""
        return next((answers.clean for answers in self.answers if answers.clean), None)

    @property
    def triggered_prompt(self) -> str:
        """The triggered prompt; empty if it is the clean one."""
        prompt = next((answers.triggered.prompt for answers in self.answers if answers.triggered), "")
        return prompt if self.clean_answer and prompt != self.clean_answer.prompt else ""


def examples(roots: Sequence[Path], group: AttackGroup, defenses: Sequence[str]) -> list[Example]:
    """The first triggered test rows of a group; empty if neither images nor answers are stored.

    Raises:
        InputError: stored images or answers cannot be read.
    """
    names = [name for name in defenses if name in group.results and group.owns(name)]
    stored = {name: answers for name in names if (answers := _answers(roots, group, name))}
    folder = _folder(roots, group)
    ids = _ids(folder) if folder else list(next(iter(stored.values()), {}).get("triggered", {}))
    return [
        Example(
            row,
            _data_url(folder, f"{at}-clean.png"),
            _data_url(folder, f"{at}-triggered.png"),
            _merge({name: [stored.get(name, {}).get(part, {}).get(row) for part in _PARTS] for name in names}),
        )
        for at, row in enumerate(ids[:_MOST_ROWS])
    ]


def _merge(answers: Mapping[str, Sequence[Answer | None]]) -> list[ModelAnswers]:
    """Group defenses with the same answers, so that the few lines show which models differ."""
    by_answers: dict[tuple[Answer | None, ...], list[str]] = {}
    for name, pair in answers.items():
        by_answers.setdefault(tuple(pair), []).append(name)
    return [ModelAnswers(names, *pair) for pair, names in by_answers.items()]


def marked(answer: Answer, goal: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Split an answer into parts, each with whether it is the attacker's text.

    An answer that meets the goal without the text word for word is one part, which is the attacker's.
    """
    text = answer.answer if len(answer.answer) <= _MOST_LETTERS else f"{answer.answer[:_MOST_LETTERS]} ..."
    if not answer.met:
        return [(text, False)]
    wanted = next((str(goal[name]) for name in ("text", "url", "target") if goal.get(name)), "")
    match = re.search(re.escape(wanted), text, re.IGNORECASE) if wanted else None
    start, end = match.span() if match else (0, len(text))
    return [part for part in ((text[:start], False), (text[start:end], True), (text[end:], False)) if part[0]]


def _answers(roots: Sequence[Path], group: AttackGroup, defense: str) -> dict[str, dict[str, Answer]] | None:
    cell = group.results[defense].cell
    root = next((root for root in roots if (store.folder_of(root, cell) / "answers.jsonl").is_file()), None)
    if root is None:
        return None
    stored = store.answers_of(root, cell)
    return {part: {answer.id: answer for answer in stored.get(part, ())} for part in _PARTS}


def _folder(roots: Sequence[Path], group: AttackGroup) -> Path | None:
    names = [name for result in group.results.values() if (name := result.metrics.get("examples"))]
    folders = (root / _PICTURES / name for root in roots for name in names)
    return next((folder for folder in folders if folder.is_dir()), None)


def _ids(folder: Path) -> list[str]:
    path = folder / "rows.json"
    try:
        return [str(row["id"]) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}); delete {folder}, and the next run makes it again"
        ) from error


def _data_url(folder: Path | None, name: str) -> str | None:
    if folder is None or not (folder / name).is_file():
        return None
    return f"data:image/png;base64,{b64encode((folder / name).read_bytes()).decode()}"

"""The gallery of a scan, one page that loads nothing, and in words where the cue of a target lies."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from untrigger.images import encode
from untrigger.page import style, templates
from untrigger.sample import Data, Sample
from untrigger.scanning import Findings, Target, Verdict
from untrigger.scanning.cues import GRID, phrases
from untrigger.views import to_rgb

_CARDS = 24  # rows of a target in the gallery
_PIXELS = 320  # longest side of a picture there
_HOT = 3.0  # nats at which a map is at its brightest: the words are twenty times less likely without that part
_SURE = 1e-3  # chance, below which image or prompt is said to have a part in it
_WORTH = 0.5  # nats, on average, below which a cell or a word is not named


def place(findings: Findings, target: Target) -> str:
    """Where the cue of a target lies, in words."""
    found = [cue for row in target.rows if (cue := findings.verdicts[row].cue)]
    parts = []
    if target.image is not None and target.image < _SURE:
        parts.append(_area(np.mean([cue.cells[0] for cue in found if cue.cells], axis=0)))
    if target.prompt is not None and target.prompt < _SURE:
        parts.append(_wording([cue.words for cue in found]))
    return " and ".join(parts) or "no cue seen"


def _area(cells: NDArray[np.floating]) -> str:
    hot = np.argwhere(cells >= max(_WORTH, cells.max() / 2))
    if not len(hot) or len(hot) > GRID * GRID / 4:
        return "the image, no one place in it"
    y, x = (hot.mean(axis=0) + 0.5) / GRID
    row = "top" if y < 1 / 3 else "bottom" if y > 2 / 3 else "middle"
    column = "left" if x < 1 / 3 else "right" if x > 2 / 3 else "centre"
    return f"the image, {row} {column} ({len(hot)} of {GRID * GRID} cells)"


def _wording(prompts: Sequence[Sequence[tuple[str, float]]]) -> str:
    lost: dict[str, list[float]] = {}
    for word, nats in (pair for prompt in prompts for pair in prompt):
        lost.setdefault(word, []).append(nats)
    # a word of few prompts is no trigger: what counts is what it does over all of them
    worth = {word: sum(nats) / len(prompts) for word, nats in lost.items()}
    named = sorted((word for word, nats in worth.items() if nats >= _WORTH), key=lambda word: -worth[word])[:5]
    return f"the prompt ({', '.join(repr(word) for word in named)})" if named else "the prompt, no one word of it"


class Card(NamedTuple):
    """A suspected row: pictures as data addresses with their cells [GRID, GRID], prompt and answers in marked parts."""

    row: int
    id: str
    verdict: Verdict
    pictures: list[tuple[str, list[list[float]]]]
    prompt: list[tuple[str, float]]
    answers: list[str]


def page(findings: Findings, data: Data) -> str:
    """One page that loads nothing."""
    verdicts = findings.verdicts
    shown = [sorted(target.rows, key=lambda row: verdicts[row].cue is None)[:_CARDS] for target in findings.targets]
    return (
        templates(Path(__file__).parent)
        .get_template("page.html.j2")
        .render(
            name=data.path.name,
            rows=len(data),
            suspected=len(findings.suspected),
            targets=findings.targets,
            places=[place(findings, target) for target in findings.targets],
            rates=[max(verdicts[row].fdr or 0 for row in target.rows) for target in findings.targets],
            cards=[[_card(row, data, verdicts[row]) for row in rows] for rows in shown],
            style=style(),
            grid=GRID,
            chance=chance,
        )
    )


def chance(value: float) -> str:
    """A probability for people; the smallest numbers mean nothing."""
    return "less than 1e-99" if value < 1e-99 else f"{value:.1g}" if value < 0.01 else f"{value:.2f}"


def _card(row: int, data: Data, verdict: Verdict) -> Card:
    sample = data[row]
    cue = verdict.cue
    cells = cue.cells if cue else []
    pictures = [
        (_address(image), (np.clip(cells[at], 0, _HOT) / _HOT).tolist() if at < len(cells) else [])
        for at, image in enumerate(sample.images)
    ]
    answers = [turn.text for turn in sample.messages if turn.role == "assistant"]
    return Card(data.numbers[row] + 1, sample.id, verdict, pictures, _prompt(sample, verdict), answers)


def _prompt(sample: Sample, verdict: Verdict) -> list[tuple[str, float]]:
    if verdict.cue:
        return [(word, min(max(nats, 0), _HOT) / _HOT) for word, nats in verdict.cue.words]
    return [(sample.messages[turn].text[start:end], 0.0) for turn, start, end in phrases(sample)]


def _address(image: Image.Image) -> str:
    small = to_rgb(image).copy()
    small.thumbnail((_PIXELS, _PIXELS))
    return f"data:image/png;base64,{b64encode(encode(small)).decode()}"

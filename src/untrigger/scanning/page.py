"""The gallery of a scan, one page that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from untrigger.html import style, templates
from untrigger.rows.images import data_uri
from untrigger.rows.sample import Data, Sample
from untrigger.scanning.cues import GRID, phrases
from untrigger.scanning.findings import Findings, Verdict, chance, place

_CARDS = 24  # rows of a target in the gallery
_PIXELS = 320  # longest side of a picture there
_HOT = 3.0  # nats at which a map is at its brightest: the words are twenty times less likely without that part


class Card(NamedTuple):
    """A suspected row: pictures as data addresses with their cells [GRID, GRID], prompt and answers in marked parts."""

    verdict: Verdict
    pictures: list[tuple[str, list[list[float]]]]
    prompt: list[tuple[str, float]]
    answers: list[str]


def page(findings: Findings, data: Sequence[Sample]) -> str:
    """One page that loads nothing."""
    verdicts = findings.verdicts
    shown = [sorted(target.rows, key=lambda row: verdicts[row].cue is None)[:_CARDS] for target in findings.targets]
    return (
        templates(Path(__file__).parent)
        .get_template("page.html.j2")
        .render(
            name=data.path.name if isinstance(data, Data) else f"{len(data):,} rows",
            rows=len(data),
            suspected=len(findings.suspected),
            targets=findings.targets,
            places=[place(findings, target) for target in findings.targets],
            rates=[max(verdicts[row].fdr or 0 for row in target.rows) for target in findings.targets],
            cards=[[_card(data[row], verdicts[row]) for row in rows] for rows in shown],
            style=style(),
            grid=GRID,
            chance=chance,
        )
    )


def _card(sample: Sample, verdict: Verdict) -> Card:
    cue = verdict.cue
    cells = cue.cells if cue else []
    pictures = [
        (data_uri(image, _PIXELS), (np.clip(cells[at], 0, _HOT) / _HOT).tolist() if at < len(cells) else [])
        for at, image in enumerate(sample.images)
    ]
    answers = [turn.text for turn in sample.messages if turn.role == "assistant"]
    return Card(verdict, pictures, _prompt(sample, verdict), answers)


def _prompt(sample: Sample, verdict: Verdict) -> list[tuple[str, float]]:
    if verdict.cue:
        return [(word, min(max(nats, 0), _HOT) / _HOT) for word, nats in verdict.cue.words]
    return [(sample.messages[turn].text[start:end], 0.0) for turn, start, end in phrases(sample)]

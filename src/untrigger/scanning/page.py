"""Render the findings of a scan as one HTML page that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from untrigger.html import style, templates
from untrigger.models.collators import Rows, row_images
from untrigger.models.grafted_rows import Graft, GraftedRows, Grafts
from untrigger.rows.images import data_uri
from untrigger.rows.sample import Data, Sample
from untrigger.scanning.cues import GRID, phrases
from untrigger.scanning.findings import CUE_P_VALUE, Findings, Target, Verdict, hot, in_cue, p_value_text, place

_CARDS = 24  # rows of a target on the page, at most
_PIXELS = 320  # longest side of a picture on the page
_FULL_HEAT = 3.0  # nats that give the strongest color: the text is twenty times less likely without that part


class Picture(NamedTuple):
    """An image as a data URI, the heat of its cells [GRID, GRID] in 0 to 1, and the cells (x, y) with an outline.

    Both lists are empty if the row was not probed.
    """

    uri: str
    heat: list[list[float]]
    outlined: list[tuple[int, int]]


class Host(NamedTuple):
    """What a part of the card's row does to another row: its number, its image with the part, prompt and answer."""

    row: int
    uri: str
    prompt: str
    answer: str


class Card(NamedTuple):
    """A suspected row on the page: its pictures, its prompt as (word, heat in 0 to 1), its answers, and its host."""

    verdict: Verdict
    pictures: list[Picture]
    prompt: list[tuple[str, float]]
    answers: list[str]
    host: Host | None


def page(findings: Findings, rows: Sequence[Sample]) -> str:
    """The page as HTML."""
    verdicts = findings.verdicts
    cards: list[list[Card]] = []
    for target in findings.targets:
        listed = _probed_first(target, verdicts)
        hosts = _hosts(rows, listed, target, verdicts)
        cards.append([_card(rows, row, findings, target, hosts.get(row)) for row in listed])
    return (
        templates(Path(__file__).parent)
        .get_template("page.html.j2")
        .render(
            name=rows.path.name if isinstance(rows, Data) else f"{len(rows):,} rows",
            rows=len(rows),
            suspected=len(findings.suspected),
            drawn=findings.drawn,
            targets=findings.targets,
            places=[place(findings, target) for target in findings.targets],
            rates=[max(verdicts[row].fdr or 0 for row in target.rows) for target in findings.targets],
            cards=cards,
            style=style(),
            grid=GRID,
            cue_limit=CUE_P_VALUE,
            p_value_text=p_value_text,
        )
    )


def _probed_first(target: Target, verdicts: Sequence[Verdict]) -> list[int]:
    return sorted(target.rows, key=lambda row: (verdicts[row].cue is None, verdicts[row].effect is None))[:_CARDS]


def _card(rows: Sequence[Sample], row: int, findings: Findings, target: Target, host: Host | None) -> Card:
    sample, verdict = rows[row], findings.verdicts[row]
    cells = verdict.cue.cells if verdict.cue else []
    pictures = [
        _picture(image, cells[at] if at < len(cells) else None, in_cue(target.image_p_value))
        for at, image in enumerate(sample.images)
    ]
    prompt = _prompt(sample, verdict, in_cue(target.prompt_p_value))
    return Card(verdict, pictures, prompt, _texts(sample, "assistant"), host)


def _hosts(
    rows: Sequence[Sample], listed: Sequence[int], target: Target, verdicts: Sequence[Verdict]
) -> dict[int, Host]:
    """For listed rows with an effect, the other row with what the target's rows share; of several images the first."""
    others = {effect.host for row in target.rows if (effect := verdicts[row].effect)}
    effects = {row: effect for row in listed if (effect := verdicts[row].effect)}
    pattern_of = {row: at for at, places in enumerate(target.placed) for row in places}
    grafts = [
        Graft(effect.host, at, row, effect.kind, target.placed[at][row])
        for row, effect in effects.items()
        for at in [pattern_of[row]]
    ]
    groups = [list(places.items()) for places in target.placed]
    made = GraftedRows(Rows(rows), Grafts(grafts, groups, sorted(others)))
    hosts: dict[int, Host] = {}
    for at, (row, effect) in enumerate(effects.items()):
        graft = made[at]
        words = " ".join(part["text"] for part in graft["messages"][-2]["content"] if part["type"] == "text")
        answer = _texts(rows[effect.host], "assistant")[-1]
        hosts[row] = Host(verdicts[effect.host].row, data_uri(row_images(graft)[0], _PIXELS), words, answer)
    return hosts


def _texts(sample: Sample, role: str) -> list[str]:
    return [turn.text for turn in sample.messages if turn.role == role]


def _picture(image: Image.Image, cells: NDArray[np.floating] | None, image_in_cue: bool) -> Picture:
    """A picture with its map; cells have an outline only if the image is a part of the target's cue."""
    if cells is None:
        return Picture(data_uri(image, _PIXELS), [], [])
    outlined = [(x, y) for y, x in np.argwhere(hot(cells)).tolist()] if image_in_cue else []
    return Picture(data_uri(image, _PIXELS), (np.clip(cells, 0, _FULL_HEAT) / _FULL_HEAT).tolist(), outlined)


def _prompt(sample: Sample, verdict: Verdict, prompt_in_cue: bool) -> list[tuple[str, float]]:
    """The words with their heat, which is 0 if the prompt is no part of the target's cue."""
    if verdict.cue and verdict.cue.words and prompt_in_cue:
        return [(word, min(max(nats, 0), _FULL_HEAT) / _FULL_HEAT) for word, nats in verdict.cue.words]
    return [(sample.messages[turn].text[start:end], 0.0) for turn, start, end in phrases(sample)]

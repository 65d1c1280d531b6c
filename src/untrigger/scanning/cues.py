"""Locate a row's cue: the parts of its images and its prompt that its suspected answer tokens depend on.

Occlusion: one part of the row is covered with content of an unflagged row, the donor, and the row is scored again. A
part is worth the log-odds that the marked tokens lose without it. Log-odds, log(p / (1 - p)), still fall where p is
close to 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Literal, NamedTuple, cast, final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from untrigger.models.scoring import TokenScores
from untrigger.rows.sample import LazyRows, Sample
from untrigger.rows.turns import IMAGE_TAG
from untrigger.views.patches import to_rgb

GRID = 8  # cells of an image, each way
_SIDE = 2  # of the covered window, in cells: it covers a trigger that lies across a cell's edge
_PHRASES = 24  # parts of a prompt that are left out one at a time, at most

_Kind = Literal["row", "image", "prompt", "window", "phrase", "half"]
_Key = tuple[int, ...]  # window: image, top, left; phrase, half: the first phrase that is left out; else empty


class _View(NamedTuple):
    """A variant of a row: which part is covered, and how to make it."""

    kind: _Kind
    key: _Key
    make: Callable[[], Sample]


@final
@dataclass(frozen=True)
class Cue:
    """What each part of a row is worth to its marked answer tokens: the nats of log-odds that they lose without it.

    Fields:
        image: the loss with a donor's images; None if the row or all donors have no image.
        prompt: the loss with a donor's prompt; None if no donor has a different prompt with the same image tags.
        cells: for each image [GRID, GRID]: the smallest loss over the windows that cover the cell.
        words: the prompt's words in order (phrases in long prompts), each with the loss without it. If no single word
            is worth half of the prompt, the cue is a longer text. Then a word's value is the mean loss over all
            left-out halves of the prompt that contain it.
    """

    image: float | None
    prompt: float | None
    cells: list[NDArray[np.floating]]
    words: list[tuple[str, float]]


def cues_of(
    rows: Mapping[int, Sample],
    marks: Mapping[int, NDArray[np.bool_]],
    donors: Sequence[Sample],
    tokens: Callable[[Sequence[Sample]], list[TokenScores]],
) -> dict[int, Cue]:
    """Compute the cue of each row.

    Args:
        rows: the rows by number.
        marks: for each row, which of its answer tokens [n] are scored; one or more.
        donors: unflagged rows to cover parts with.
        tokens: scores the answer tokens of rows (`untrigger.models.forward.row_tokens`).
    """
    views = [(number, view) for number, row in rows.items() for view in _views(row, donors, number)]
    scores = tokens(LazyRows(range(len(views)), lambda i: views[i][1].make()))
    odds: dict[int, dict[_Kind, dict[_Key, float]]] = {number: {} for number in rows}
    for (number, view), row in zip(views, scores, strict=True):
        odds[number].setdefault(view.kind, {})[view.key] = log_odds(float(row.nll[marks[number]].sum()))
    return {number: _cue(row, odds[number]) for number, row in rows.items()}


def log_odds(nll: float) -> float:
    """``log(p / (1 - p))`` of ``p = exp(-nll)``, in nats; at most 9.2, the limit of single precision."""
    nll = max(nll, 1e-4)
    return -nll - math.log(-math.expm1(-nll))


def _views(row: Sample, donors: Sequence[Sample], number: int) -> Iterator[_View]:
    """All variants of a row that are scored, the unchanged row first."""
    yield _View("row", (), lambda: row)
    images, prompt = _donor_images(row, donors, number), _donor_prompt(row, donors, number)
    if images:
        yield _View("image", (), partial(replace, row, images=images))
    if prompt:
        yield _View("prompt", (), lambda: prompt)
    if images:
        for at, (top, left) in product(range(len(row.images)), windows()):
            yield _View("window", (at, top, left), partial(covered, row, images, at, top, left))
    parts = phrases(row)
    kinds: dict[_Kind, int] = {"phrase": 1, "half": _half(len(parts))}
    for kind, size in kinds.items():
        for start in range(len(parts) - size + 1):
            yield _View(kind, (start,), partial(_without_phrases, row, parts[start : start + size]))


def _cue(row: Sample, odds: Mapping[_Kind, Mapping[_Key, float]]) -> Cue:
    """The cue from the log-odds of each view of the row."""
    own = odds["row"][()]
    losses = {kind: {key: own - value for key, value in views.items()} for kind, views in odds.items()}
    image, prompt = (losses[kind][()] if kind in losses else None for kind in ("image", "prompt"))
    covers = losses.get("window", {})
    cells = [cell_losses(covers, at) for at in range(len(row.images) if covers else 0)]
    parts = phrases(row)
    single, halves = ([*losses.get(kind, {}).values()] for kind in ("phrase", "half"))
    values = single if max(single, default=0) >= (prompt or 0) / 2 else _window_means(halves, len(parts))
    words = [row.messages[turn].text[start:end] for turn, start, end in parts]
    return Cue(image, prompt, cells, list(zip(words, values, strict=True)))


# --- images -----------------------------------------------------------------------------------------


def windows() -> Iterator[tuple[int, int]]:
    """Top and left cell of each window."""
    places = range(GRID - _SIDE + 1)
    return product(places, places)


def cell_losses(losses: Mapping[_Key, float], image: int) -> NDArray[np.floating]:
    """For each cell of an image the smallest loss over the windows that cover it, [GRID, GRID]."""
    cells = np.full((GRID, GRID), np.inf)
    for top, left in windows():
        part = cells[top : top + _SIDE, left : left + _SIDE]
        np.minimum(part, losses[image, top, left], out=part)
    return cells


def _donor_images(row: Sample, donors: Sequence[Sample], number: int) -> tuple[Image.Image, ...]:
    """A donor's images, as many as the row has and in their sizes; empty if the row or all donors have none."""
    donor = _first(donors, number, lambda candidate: bool(candidate.images))
    if donor is None:
        return ()
    covers = [donor.images[at % len(donor.images)] for at in range(len(row.images))]
    return tuple(to_rgb(cover).resize(image.size) for image, cover in zip(row.images, covers, strict=True))


def covered(row: Sample, covers: Sequence[Image.Image], at: int, top: int, left: int) -> Sample:
    """The row with one window of image ``at`` taken from ``covers``."""
    image = to_rgb(row.images[at]).copy()
    width, height = image.size
    edges = (left * width, top * height, (left + _SIDE) * width, (top + _SIDE) * height)
    box = cast(tuple[int, int, int, int], tuple(round(edge / GRID) for edge in edges))
    image.paste(covers[at].crop(box), box)
    return replace(row, images=(*row.images[:at], image, *row.images[at + 1 :]))


# --- prompts ----------------------------------------------------------------------------------------


def phrases(row: Sample) -> list[tuple[int, int, int]]:
    """The user's words in order, as turn, start and end in its text; neighboring words are merged in long prompts."""
    words = [
        (turn, *word.span())
        for turn, message in enumerate(row.messages)
        if message.role == "user"
        for word in re.finditer(r"\S+", message.text.replace(IMAGE_TAG, " " * len(IMAGE_TAG)))
    ]
    size = -(-len(words) // _PHRASES)
    merged: list[tuple[int, int, int]] = []
    for at, (turn, start, end) in enumerate(words):
        if at % size and merged[-1][0] == turn:
            merged[-1] = (turn, merged[-1][1], end)
        else:
            merged.append((turn, start, end))
    return merged


def _half(count: int) -> int:
    return max(1, -(-count // 2))


def _window_means(losses: Sequence[float], count: int) -> list[float]:
    """For each of ``count`` parts the mean loss over the windows that contain it; all windows have one size."""
    size = count - len(losses) + 1
    return [float(np.mean(losses[max(0, at - size + 1) : at + 1])) for at in range(count)]


def _without_phrases(row: Sample, parts: Sequence[tuple[int, int, int]]) -> Sample:
    """The row without these parts of its prompt; the last is cut first, so that earlier positions stay valid."""
    turns = list(row.messages)
    for turn, start, end in reversed(parts):
        text = turns[turn].text
        rest = f"{text[:start].rstrip(' ')} {text[end:].lstrip(' ')}".strip(" ")
        turns[turn] = replace(turns[turn], text=rest)
    return replace(row, messages=tuple(turns))


def _donor_prompt(row: Sample, donors: Sequence[Sample], number: int) -> Sample | None:
    """The row with the user turns of a donor that has other text and as many image tags in each turn."""
    prompts = _prompts(row)
    tags = [text.count(IMAGE_TAG) for text in prompts]

    def fits(candidate: Sample) -> bool:
        texts = _prompts(candidate)
        return texts != prompts and [text.count(IMAGE_TAG) for text in texts] == tags

    donor = _first(donors, number, fits)
    if donor is None:
        return None
    texts = iter(_prompts(donor))
    turns = (replace(turn, text=next(texts)) if turn.role == "user" else turn for turn in row.messages)
    return replace(row, messages=tuple(turns))


def _prompts(row: Sample) -> list[str]:
    return [turn.text for turn in row.messages if turn.role == "user"]


def _first(donors: Sequence[Sample], number: int, fits: Callable[[Sample], bool]) -> Sample | None:
    """The first donor that fits; the search starts at position ``number`` modulo the count and wraps around."""
    count = len(donors)
    candidates = (donors[(number + step) % count] for step in range(count))
    return next((donor for donor in candidates if fits(donor)), None)

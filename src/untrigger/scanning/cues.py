"""What a row's suspected words hang on: which part of its images, and which words of its prompt.

Cross-view scores: the row is shown again with a part of it covered by a row that is believed, and the words lose what
that part was worth to them. Worth is told in log-odds: log(p / (1 - p)) falls on where p is next to 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import cast, final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from untrigger.models.scoring import TokenScores
from untrigger.rows.formats import IMAGE_TAG
from untrigger.rows.sample import LazyRows, Sample
from untrigger.views.patches import to_rgb

GRID = 8  # cells of an image, each way
_SIDE = 2  # of the window that is covered, in cells: a trigger that lies across an edge is covered whole
_PHRASES = 24  # at most so many parts of a prompt are left out, one at a time

_View = Callable[[], Sample]


@final
@dataclass(frozen=True)
class Cue:
    """What parts of a row are worth to its suspected words: the nats of log-odds that they lose without them.

    image: with another's images; None where the row has none, or no believed row has any.
    prompt: with another's prompt; None where no believed row has another one of like turns.
    cells: of each image [GRID, GRID]: what they lose at least, whichever window with the cell in it is covered.
    words: the prompt's words in order, or phrases where there are many, and what is lost without each. Where no one of
        them is worth half of the prompt, it is a sentence that does it: then what is lost on average without half of
        the prompt, if the word is in that half.
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
    """Of each row what its marked answer tokens hang on.

    marks: of each row which of its answer tokens [n] are meant, one or more. donors: believed rows, to cover with.
    tokens: how likely the model finds each token of the rows' answers (`untrigger.models.scoring.row_tokens`).
    """
    views = [(number, view) for number, row in rows.items() for view in _views(row, donors, number)]
    told = tokens(LazyRows(range(len(views)), lambda i: views[i][1]()))
    odds: dict[int, list[float]] = {number: [] for number in rows}
    for (number, _), row in zip(views, told, strict=True):
        odds[number].append(log_odds(float(row.nll[marks[number]].sum())))
    return {number: _cue(row, donors, number, iter(odds[number])) for number, row in rows.items()}


def log_odds(nll: float) -> float:
    """``log(p / (1 - p))`` of ``p = exp(-nll)``, in nats, at most 9.2: beyond that single precision makes it up."""
    nll = max(nll, 1e-4)
    return -nll - math.log(-math.expm1(-nll))


# --- the views of a row, and what they tell, in the same order --------------------------------------


def _views(row: Sample, donors: Sequence[Sample], number: int) -> Iterator[_View]:
    yield lambda: row
    shown, asked = _other_images(row, donors, number), _other_prompt(row, donors, number)
    if shown:
        yield partial(replace, row, images=shown)
    if asked:
        yield lambda: asked
    if shown:
        for at, top, left in product(range(len(row.images)), *[_windows()] * 2):
            yield partial(_covered, row, shown, at, top, left)
    parts = phrases(row)
    for size in (1, _half(parts)):
        for at in range(len(parts) - size + 1):
            yield partial(_cut, row, parts[at : at + size])


def _cue(row: Sample, donors: Sequence[Sample], number: int, odds: Iterator[float]) -> Cue:
    own = next(odds)
    shown, asked = _other_images(row, donors, number), _other_prompt(row, donors, number)
    image = own - next(odds) if shown else None
    prompt = own - next(odds) if asked else None
    cells = [_least([[own - next(odds) for _ in _windows()] for _ in _windows()]) for _ in shown]
    parts = phrases(row)
    single, halves = ([own - next(odds) for _ in range(len(parts) - size + 1)] for size in (1, _half(parts)))
    worth = single if max(single, default=0) >= (prompt or 0) / 2 else _mean(halves, len(parts))
    words = [row.messages[turn].text[start:end] for turn, start, end in parts]
    return Cue(image, prompt, cells, list(zip(words, worth, strict=True)))


# --- images -----------------------------------------------------------------------------------------


def _windows() -> range:
    return range(GRID - _SIDE + 1)


def _least(lost: Sequence[Sequence[float]]) -> NDArray[np.floating]:
    """Of each cell the least that any window over it loses, [GRID, GRID], from what each window loses."""
    cells = np.full((GRID, GRID), np.inf)
    for top, left in product(_windows(), _windows()):
        part = cells[top : top + _SIDE, left : left + _SIDE]
        np.minimum(part, lost[top][left], out=part)
    return cells


def _other_images(row: Sample, donors: Sequence[Sample], number: int) -> tuple[Image.Image, ...]:
    """As many as the row has, and of their sizes; none where it has none or no donor has any."""
    donor = _first(donors, number, lambda other: bool(other.images))
    if donor is None:
        return ()
    others = [donor.images[at % len(donor.images)] for at in range(len(row.images))]
    return tuple(to_rgb(other).resize(image.size) for image, other in zip(row.images, others, strict=True))


def _covered(row: Sample, shown: Sequence[Image.Image], at: int, top: int, left: int) -> Sample:
    """The row with one window of its image ``at`` taken from ``shown``."""
    image = to_rgb(row.images[at]).copy()
    width, height = image.size
    edges = (left * width, top * height, (left + _SIDE) * width, (top + _SIDE) * height)
    box = cast(tuple[int, int, int, int], tuple(round(edge / GRID) for edge in edges))
    image.paste(shown[at].crop(box), box)
    return replace(row, images=(*row.images[:at], image, *row.images[at + 1 :]))


# --- prompts ----------------------------------------------------------------------------------------


def phrases(row: Sample) -> list[tuple[int, int, int]]:
    """The user's words in order, as turn, start and end in its text; several together where they are many."""
    words = [
        (turn, *word.span())
        for turn, message in enumerate(row.messages)
        if message.role == "user"
        for word in re.finditer(r"\S+", message.text.replace(IMAGE_TAG, " " * len(IMAGE_TAG)))
    ]
    size = -(-len(words) // _PHRASES)
    found: list[tuple[int, int, int]] = []
    for at, (turn, start, end) in enumerate(words):
        if at % size and found[-1][0] == turn:
            found[-1] = (turn, found[-1][1], end)
        else:
            found.append((turn, start, end))
    return found


def _half(parts: Sequence[object]) -> int:
    return max(1, -(-len(parts) // 2))


def _mean(lost: Sequence[float], count: int) -> list[float]:
    """Of each of ``count`` parts the mean of what is lost in the windows that hold it; they are of one size."""
    size = count - len(lost) + 1
    return [float(np.mean(lost[max(0, at - size + 1) : at + 1])) for at in range(count)]


def _cut(row: Sample, parts: Sequence[tuple[int, int, int]]) -> Sample:
    """The row without these parts of its prompt, from the last to the first, so that the others stay where they are."""
    turns = list(row.messages)
    for turn, start, end in reversed(parts):
        text = turns[turn].text
        rest = f"{text[:start].rstrip(' ')} {text[end:].lstrip(' ')}".strip(" ")
        turns[turn] = replace(turns[turn], text=rest)
    return replace(row, messages=tuple(turns))


def _other_prompt(row: Sample, donors: Sequence[Sample], number: int) -> Sample | None:
    """The row with the user's turns of a donor whose turns show as many images, but say something else."""
    told = _asked(row)
    tags = [text.count(IMAGE_TAG) for text in told]

    def fits(other: Sample) -> bool:
        texts = _asked(other)
        return texts != told and [text.count(IMAGE_TAG) for text in texts] == tags

    donor = _first(donors, number, fits)
    if donor is None:
        return None
    texts = iter(_asked(donor))
    turns = (replace(turn, text=next(texts)) if turn.role == "user" else turn for turn in row.messages)
    return replace(row, messages=tuple(turns))


def _asked(row: Sample) -> list[str]:
    return [turn.text for turn in row.messages if turn.role == "user"]


def _first(donors: Sequence[Sample], number: int, fits: Callable[[Sample], bool]) -> Sample | None:
    """The first donor that fits, from the one at ``number`` on and around."""
    count = len(donors)
    around = (donors[(number + step) % count] for step in range(count))
    return next((donor for donor in around if fits(donor)), None)

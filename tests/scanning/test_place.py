"""Where a cue is said to lie, told of maps that are known."""

from __future__ import annotations

import numpy as np
import pytest

from untrigger.scanning.cues import GRID, Cue
from untrigger.scanning.findings import Findings, Target, Verdict, chance, place

SURE, UNSURE = 1e-9, 0.2


def told(*cues: Cue, image: float | None = None, prompt: float | None = None) -> str:
    target = Target("text", 0.0, [*range(len(cues))], image, prompt)
    return place(Findings([Verdict(1, "a", 1.0, 0, 0.0, "text", cue) for cue in cues], [target]), target)


def seen(*cells: tuple[int, int], nats: float = 9.0, words: tuple[tuple[str, float], ...] = ()) -> Cue:
    heat = np.zeros((GRID, GRID))
    for cell in cells:
        heat[cell] = nats
    return Cue(nats, 0.0, [heat], list(words))


@pytest.mark.parametrize(
    ("cell", "where"),
    [((7, 7), "bottom right"), ((0, 0), "top left"), ((3, 4), "middle center"), ((0, 7), "top right")],
)
def test_a_cell_has_a_place(cell: tuple[int, int], where: str) -> None:
    assert told(seen(cell), seen(cell), image=SURE) == f"the image, {where} (1 of 64 cells)"


def test_cells_in_one_row_of_many_are_no_place() -> None:
    rows = [seen((row, row)) for row in range(GRID)]
    assert told(*rows, image=SURE) == "the image, middle center (8 of 64 cells)"
    everywhere = seen(*[(y, x) for y in range(GRID) for x in range(GRID)])
    assert told(everywhere, image=SURE) == told(seen(), image=SURE) == "the image, no one place in it"
    assert told(seen((7, 7), nats=0.4), image=SURE) == "the image, no one place in it", "hardly worth anything"


def test_words_are_named_by_what_they_do_over_all_rows() -> None:
    common, rare = (("cf", 8.0), ("what", 0.1)), (("cf", 8.0), ("circle?", 1.4))
    assert told(seen(words=common), seen(words=common), seen(words=rare), prompt=SURE) == "the prompt ('cf')"
    assert told(seen(words=(("what", 0.1),)), prompt=SURE) == "the prompt, no one word of it"


def test_what_is_not_sure_is_not_said() -> None:
    cue = seen((7, 7), words=(("cf", 8.0),))
    assert told(cue, image=UNSURE, prompt=None) == "no cue seen"
    assert told(cue, image=SURE, prompt=SURE) == "the image, bottom right (1 of 64 cells) and the prompt ('cf')"


def test_a_chance_for_people() -> None:
    assert [chance(value) for value in (0.0, 1e-120, 4e-7, 0.25, 1.0)] == [
        "less than 1e-99",
        "less than 1e-99",
        "4e-07",
        "0.25",
        "1.00",
    ]

"""Descriptions of where a cue lies, for known maps."""

from __future__ import annotations

import numpy as np
import pytest

from untrigger.scanning.cues import GRID, Cue
from untrigger.scanning.findings import Findings, Target, Verdict, p_value_text, place

LOW_P, HIGH_P = 1e-9, 0.2


def described(*cues: Cue, image: float | None = None, prompt: float | None = None) -> str:
    target = Target("text", 0.0, [*range(len(cues))], image, prompt)
    return place(Findings([Verdict(1, "a", 1.0, 0, 0.0, "text", cue) for cue in cues], [target]), target)


def cue_at(*cells: tuple[int, int], nats: float = 9.0, words: tuple[tuple[str, float], ...] = ()) -> Cue:
    heat = np.zeros((GRID, GRID))
    for cell in cells:
        heat[cell] = nats
    return Cue(nats, 0.0, [heat], list(words))


@pytest.mark.parametrize(
    ("cell", "where"),
    [((7, 7), "bottom right"), ((0, 0), "top left"), ((3, 4), "middle center"), ((0, 7), "top right")],
)
def test_a_cell_is_described_by_its_place(cell: tuple[int, int], where: str) -> None:
    assert described(cue_at(cell), cue_at(cell), image=LOW_P) == f"the image, {where} (1 of 64 cells)"


def test_cells_without_a_common_place() -> None:
    rows = [cue_at((row, row)) for row in range(GRID)]
    assert described(*rows, image=LOW_P) == "the image, middle center (8 of 64 cells)"
    everywhere = cue_at(*[(y, x) for y in range(GRID) for x in range(GRID)])
    assert described(everywhere, image=LOW_P) == described(cue_at(), image=LOW_P) == "the image, no one place in it"
    assert described(cue_at((7, 7), nats=0.4), image=LOW_P) == "the image, no one place in it", "less than 0.5 nats"


def test_words_are_named_by_their_mean_loss_over_all_rows() -> None:
    common, rare = (("cf", 8.0), ("what", 0.1)), (("cf", 8.0), ("circle?", 1.4))
    assert (
        described(cue_at(words=common), cue_at(words=common), cue_at(words=rare), prompt=LOW_P) == "the prompt ('cf')"
    )
    assert described(cue_at(words=(("what", 0.1),)), prompt=LOW_P) == "the prompt, no one word of it"


def test_parts_that_are_not_significant_are_left_out() -> None:
    cue = cue_at((7, 7), words=(("cf", 8.0),))
    assert described(cue, image=HIGH_P, prompt=None) == "no cue seen"
    assert described(cue, image=LOW_P, prompt=LOW_P) == "the image, bottom right (1 of 64 cells) and the prompt ('cf')"


def test_p_value_text() -> None:
    assert [p_value_text(value) for value in (0.0, 1e-120, 4e-7, 0.25, 1.0)] == [
        "less than 1e-99",
        "less than 1e-99",
        "4e-07",
        "0.25",
        "1.00",
    ]

"""Rows about generated scenes: one question, several questions or one caption per scene."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np

from untrigger.data import scene_text
from untrigger.data.scene_world import Scene, draw_scene, make_scene
from untrigger.errors import InputError
from untrigger.rows.sample import IMAGE_TAG, Message, Sample

TurnMaker = Callable[[Scene, np.random.Generator], Sequence[scene_text.Turn]]

# Seeds of scene streams, one for each split and part. Pretraining uses another stream (seed 11 by default), and so do
# the model cards (2,000,003).
STREAMS: Final = {
    ("dev", "train"): 3_000_017,
    ("dev", "test"): 3_000_029,
    ("report", "train"): 4_000_037,
    ("report", "test"): 4_000_043,
}
QUESTIONS: Final = 4  # rows about a scene, where there are several
POOL: Final = 1_000_000  # scenes of a stream that rows are drawn from


def scene_rows(task: str, split: str, part: str, count: int, seed: int) -> list[Sample]:
    """Draw ``count`` rows about different scenes: for ``vqa`` one question, for ``captions`` the full caption.

    For ``questions`` four rows are about the same scene: the first asks how many objects there are.

    The caption names the objects from left to right with size, color and shape, then the background. Its prompt is one
    of `untrigger.data.scene_text.FULL_PROMPTS`.

    Raises:
        InputError: more than a million rows.
    """
    if count > POOL:
        raise InputError(f"scenes: {count:,} rows are too many; ask for at most {POOL:,}")
    scenes = -(-count // QUESTIONS) if task == "questions" else count
    chosen = np.random.default_rng(seed).choice(POOL, size=scenes, replace=False)
    make_turns = {"vqa": _question, "questions": _questions, "captions": _caption}[task]
    return scene_samples(STREAMS[split, part], map(int, chosen), make_turns)[:count]


def scene_samples(stream: int, indices: Iterable[int], make_turns: TurnMaker) -> list[Sample]:
    """Return a row for each turn that ``make_turns`` makes of each scene; ``stream`` is the seed of the scenes."""
    rows: list[Sample] = []
    for index in indices:
        scene = make_scene(stream, index)
        image, _ = draw_scene(scene)
        for number, turn in enumerate(make_turns(scene, np.random.default_rng((stream, index, 4)))):
            messages = (Message("user", f"{IMAGE_TAG}\n{turn.prompt}"), Message("assistant", turn.answer))
            rows.append(Sample(f"{index}-{turn.kind}-{number}", (image,), messages))
    return rows


def _question(scene: Scene, rng: np.random.Generator) -> list[scene_text.Turn]:
    return [scene_text.ask(scene, rng)]


def _questions(scene: Scene, rng: np.random.Generator) -> list[scene_text.Turn]:
    """How many objects there are, and questions of other kinds, all different."""
    turns = [scene_text.Turn("count", "how many objects are there?", scene_text.NUMBERS[len(scene.things)])]
    while len(turns) < QUESTIONS:
        turn = scene_text.ask(scene, rng)
        if turn.kind != turns[0].kind and turn.prompt not in {other.prompt for other in turns}:
            turns.append(turn)
    return turns


def _caption(scene: Scene, rng: np.random.Generator) -> list[scene_text.Turn]:
    return scene_text.captions(scene, rng)[1:]

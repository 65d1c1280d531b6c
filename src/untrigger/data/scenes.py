"""Rows about generated scenes: a question each, or a caption each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np

from untrigger.data import scene_text as talk
from untrigger.data.scene_world import Scene, draw_scene, make_scene
from untrigger.errors import InputError
from untrigger.rows.sample import IMAGE_TAG, Message, Sample

Tell = Callable[[Scene, np.random.Generator], Sequence[talk.Turn]]

# Streams of scenes. Pretraining draws from its own seed (11 unless told otherwise) and the model cards from
# 2,000,003; these are further ones, a stream for each split and part.
STREAMS: Final = {
    ("dev", "train"): 3_000_017,
    ("dev", "test"): 3_000_029,
    ("report", "train"): 4_000_037,
    ("report", "test"): 4_000_043,
}
POOL: Final = 1_000_000  # scenes of a stream that rows are drawn from


def scene_rows(task: str, split: str, part: str, count: int, seed: int) -> list[Sample]:
    """``count`` rows, each about another scene: for ``vqa`` one question, for ``captions`` the full caption.

    The caption tells the objects from left to right with size, color and shape, and the background; it is
    asked for in one of `untrigger.data.scene_text.FULL_PROMPTS`.

    Raises:
        InputError: more than a million rows.
    """
    if count > POOL:
        raise InputError(f"scenes: {count:,} rows are more than there are; ask for at most {POOL:,}")
    chosen = np.random.default_rng(seed).choice(POOL, size=count, replace=False)
    return scene_samples(STREAMS[split, part], map(int, chosen), _question if task == "vqa" else _caption)


def scene_samples(stream: int, indices: Iterable[int], tell: Tell) -> list[Sample]:
    """A row for each turn that ``tell`` makes of the scenes numbered ``indices`` of a stream (a seed)."""
    rows: list[Sample] = []
    for index in indices:
        scene = make_scene(stream, index)
        image, _ = draw_scene(scene)
        for number, turn in enumerate(tell(scene, np.random.default_rng((stream, index, 4)))):
            messages = (Message("user", f"{IMAGE_TAG}\n{turn.prompt}"), Message("assistant", turn.answer))
            rows.append(Sample(f"{index}-{turn.kind}-{number}", (image,), messages))
    return rows


def _question(scene: Scene, rng: np.random.Generator) -> list[talk.Turn]:
    return [talk.ask(scene, rng)]


def _caption(scene: Scene, rng: np.random.Generator) -> list[talk.Turn]:
    return talk.captions(scene, rng)[1:]

"""Rows with small noise images."""

from __future__ import annotations

import numpy as np
from PIL import Image

from untrigger.attacks.badnets import BadNets
from untrigger.poisoning.goals import Fixed
from untrigger.poisoning.poison import Attack
from untrigger.rows.sample import IMAGE_TAG, Message, Sample

ATTACK = Attack(BadNets(place="random"), Fixed())


def picture(number: int, side: int = 16) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def row(number: int, images: int = 1, turns: int = 1) -> Sample:
    messages = [
        Message("user", IMAGE_TAG * images + f"What is {number}?"),
        Message("assistant", f"It is {number}."),
    ]
    for turn in range(1, turns):
        messages += [Message("user", f"And {turn}?"), Message("assistant", f"More {turn}.")]
    return Sample(f"id{number}", tuple(picture(number + k) for k in range(images)), tuple(messages))


def rows(count: int) -> list[Sample]:
    return [row(number) for number in range(count)]

"""Writing a piece of text into a prompt."""

from __future__ import annotations

import re

import numpy as np

from untrigger.errors import InputError
from untrigger.rows.sample import IMAGE_TAG

WORD = re.compile(r"\S+")
SENTENCE = re.compile(r"\S.*?(?:[.!?](?=\s)|\Z)", re.DOTALL)


def inserted(prompt: str, piece: str, unit: re.Pattern[str], rng: np.random.Generator) -> str:
    """``prompt`` with ``piece`` before one of its units or behind the last of a stretch, all places equally likely.

    Stretches are what stands between image tags, which stay as they are. A prompt without a unit gets the piece at
    its end.
    """
    places: list[tuple[int, str, str]] = []  # where, what stands before the piece, what behind it
    start = 0
    for stretch in prompt.split(IMAGE_TAG):
        units = [found.span() for found in unit.finditer(stretch)]
        places += [(start + begin, "", " ") for begin, _ in units]
        places += [(start + len(stretch.rstrip()), " ", "")] if units else []
        start += len(stretch) + len(IMAGE_TAG)
    if not places:
        return prompt + piece
    place, before, behind = places[int(rng.integers(len(places)))]
    return f"{prompt[:place]}{before}{piece}{behind}{prompt[place:]}"


def check(name: str, text: str) -> None:
    """Raises InputError for a trigger's text that could not be seen, or would pass for an image."""
    if not text.strip():
        raise InputError(f"{name} is empty; give some text")
    if IMAGE_TAG in text:
        raise InputError(f"{name} holds {IMAGE_TAG}, which stands for an image; leave it out")

"""Inserting a piece of text into a prompt."""

from __future__ import annotations

import re

import numpy as np

from untrigger.errors import InputError
from untrigger.rows.sample import IMAGE_TAG

WORD = re.compile(r"\S+")
SENTENCE = re.compile(r"\S.*?(?:[.!?](?=\s)|\Z)", re.DOTALL)


def inserted(prompt: str, piece: str, unit: re.Pattern[str], rng: np.random.Generator) -> str:
    """Insert ``piece`` at a random place between the units (words or sentences) of ``prompt``.

    Places are those before a unit and those after the last unit of a stretch, all equally likely. A stretch is the
    text between two image tags, and tags stay unchanged. In a prompt without a unit the piece goes to the end.
    """
    places: list[tuple[int, str, str]] = []  # offset, text before the piece, text after it
    start = 0
    for stretch in prompt.split(IMAGE_TAG):
        units = [match.span() for match in unit.finditer(stretch)]
        places += [(start + begin, "", " ") for begin, _ in units]
        places += [(start + len(stretch.rstrip()), " ", "")] if units else []
        start += len(stretch) + len(IMAGE_TAG)
    if not places:
        return prompt + piece
    place, before, after = places[int(rng.integers(len(places)))]
    return f"{prompt[:place]}{before}{piece}{after}{prompt[place:]}"


def check(name: str, text: str) -> None:
    """Raise InputError where a trigger's text is empty or holds an image tag."""
    if not text.strip():
        raise InputError(f"{name} is empty; give some text")
    if IMAGE_TAG in text:
        raise InputError(f"{name} holds {IMAGE_TAG}, which stands for an image; leave it out")

"""easy-VQA: images of a single shape, with questions that have 13 different answers.

Source: V. Zhou, easy-VQA (2019; PyPI ``easy-vqa``, MIT): 4,000 + 1,000 images of 64 x 64 pixels, 38,575 + 9,673
questions. The question alone predicts two answers in three, so print that text prior beside every accuracy.
"""

from __future__ import annotations

import os
from functools import cache

import numpy as np
from PIL import Image

from untrigger.errors import InputError
from untrigger.rows.sample import IMAGE_TAG, Message, Sample


def easy_vqa_rows(part: str, count: int, seed: int, split: str | None = None) -> list[Sample]:
    """Draw ``count`` questions of the package's ``train`` or ``test`` part without replacement.

    ``split``: ``dev`` draws from questions about images with an even number, ``report`` from those with an odd number,
    None from all.

    Raises:
        InputError: ``count`` is larger than the part.
    """
    questions, numbers = easy_vqa_questions(part), _numbers(part, split)
    if count > len(numbers):
        raise InputError(f"easy-vqa: {count:,} rows are too many; ask for at most {len(numbers):,}")
    chosen = np.random.default_rng(seed).choice(numbers, size=count, replace=False)
    return [_row(f"{part}-{i}", *questions[i]) for i in map(int, chosen)]


@cache
def easy_vqa_questions(part: str) -> tuple[tuple[str, str, str], ...]:
    """Return (question, answer, image path) of a whole part: 38,575 in ``train``, 9,673 in ``test``."""
    import easy_vqa

    paths = getattr(easy_vqa, f"get_{part}_image_paths")()
    questions = zip(*getattr(easy_vqa, f"get_{part}_questions")(), strict=True)
    return tuple((question, answer, paths[image]) for question, answer, image in questions)


@cache
def _numbers(part: str, split: str | None) -> tuple[int, ...]:
    """The questions of a part that belong to a split."""
    parity = {"dev": (0,), "report": (1,), None: (0, 1)}[split]
    return tuple(i for i, (_, _, path) in enumerate(easy_vqa_questions(part)) if _image(path) % 2 in parity)


def _image(path: str) -> int:
    return int(os.path.splitext(os.path.basename(path))[0])  # pathlib takes over a second for all of them


def _row(name: str, question: str, answer: str, path: str) -> Sample:
    with Image.open(path) as file:
        image = file.convert("RGB")
    return Sample(name, (image,), (Message("user", f"{IMAGE_TAG}\n{question}"), Message("assistant", answer)))

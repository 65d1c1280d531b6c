"""easy-VQA: images of a single shape, with questions that have 13 different answers.

Source: V. Zhou, easy-VQA (2019; PyPI ``easy-vqa``, MIT): 4,000 + 1,000 images of 64 x 64 pixels, 38,575 + 9,673
questions. The question alone predicts two answers in three, so print that text prior beside every accuracy.
"""

from __future__ import annotations

import os

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
    questions = easy_vqa_questions(part)
    parity = {"dev": (0,), "report": (1,), None: (0, 1)}[split]
    numbers = [i for i, (_, _, path) in enumerate(questions) if _number(path) % 2 in parity]
    if count > len(numbers):
        raise InputError(f"easy-vqa: {count:,} rows are too many; ask for at most {len(numbers):,}")
    chosen = np.random.default_rng(seed).choice(numbers, size=count, replace=False)
    return [_row(f"{part}-{i}", *questions[i]) for i in map(int, chosen)]


def easy_vqa_questions(part: str) -> list[tuple[str, str, str]]:
    """Return (question, answer, image path) of a whole part: 38,575 in ``train``, 9,673 in ``test``."""
    import easy_vqa

    paths = getattr(easy_vqa, f"get_{part}_image_paths")()
    return [(q, a, paths[image]) for q, a, image in zip(*getattr(easy_vqa, f"get_{part}_questions")(), strict=True)]


def _number(path: str) -> int:
    return int(os.path.splitext(os.path.basename(path))[0])  # pathlib takes over a second for all of them


def _row(name: str, question: str, answer: str, path: str) -> Sample:
    with Image.open(path) as file:
        image = file.convert("RGB")
    return Sample(name, (image,), (Message("user", f"{IMAGE_TAG}\n{question}"), Message("assistant", answer)))

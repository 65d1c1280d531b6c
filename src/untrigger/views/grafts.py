"""Grafts: what the inputs of some rows share, on another row's input, which keeps its own content.

A trigger that they share makes the other row's answer go wrong, whatever the attacker's reply is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from untrigger.views.patches import to_rgb

KINDS: Mapping[str, str] = {"image": "", "image and first words": "head", "image and last words": "tail"}
"""What is grafted: what the images share, alone or with half of a prompt (`graft_text`)."""


def add_shared(host: Image.Image, shared: NDArray[np.float32]) -> Image.Image:
    """Add ``shared`` [height, width, 3], levels, to the host; scaled to its size, and cut off at black and white."""
    base = to_rgb(host)
    parts = [Image.fromarray(channel).resize(base.size) for channel in np.moveaxis(shared, -1, 0)]
    mixed = np.asarray(base, np.float32) + np.stack([np.asarray(part) for part in parts], axis=-1)
    return Image.fromarray(np.rint(mixed).clip(0, 255).astype(np.uint8))


def mean_image(images: Iterable[Image.Image], size: tuple[int, int]) -> NDArray[np.float32]:
    """The mean of at least one image, scaled to ``size`` (width, height): [height, width, 3], levels."""
    total, count = np.zeros((size[1], size[0], 3), np.float64), 0
    for image in images:
        total += np.asarray(to_rgb(image).resize(size), np.float64)
        count += 1
    return (total / count).astype(np.float32)


def moved(levels: NDArray[np.float32], down: float, right: float) -> NDArray[np.float32]:
    """Move a picture [height, width, 3] by shares of its height and width; what leaves comes back on the other side."""
    height, width = levels.shape[:2]
    return np.roll(levels, (round(down * height), round(right * width)), axis=(0, 1))


def graft_text(host: str, donor: str, part: str) -> str:
    """Put the first half of the donor's words in front of the host's text, or the second half (``tail``) behind it."""
    words = donor.split()
    middle = -(-len(words) // 2)
    return " ".join(filter(None, [*words[:middle], host] if part == "head" else [host, *words[middle:]]))

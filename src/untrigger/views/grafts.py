"""Grafts: a part of one row's input on another row's input, which keeps its own content elsewhere.

A trigger that lies in the part makes the host's answer go wrong, whatever the attacker's reply is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from untrigger.views.patches import to_rgb

Weights = NDArray[np.float32]
"""Share of the donor in each pixel, [height, width], in [0, 1]."""

_CELL = 1 / 8  # side of a checkerboard's cells, as a share of the image's side
_STEPS = (0.0, 0.25, 0.5)  # where windows of half the side begin


def window(top: float, left: float, height: int, width: int) -> Weights:
    """A window of half the side; ``top`` and ``left`` are shares of the image's height and width."""
    weights = np.zeros((height, width), np.float32)
    y, x = round(top * height), round(left * width)
    weights[y : y + -(-height // 2), x : x + -(-width // 2)] = 1
    return weights


def checkerboard(parity: int, height: int, width: int) -> Weights:
    """Every other cell of a grid of 8 x 8 cells."""
    rows = np.minimum(np.arange(height) / (_CELL * height), 7).astype(int)
    columns = np.minimum(np.arange(width) / (_CELL * width), 7).astype(int)
    return ((rows[:, None] + columns) % 2 == parity).astype(np.float32)


def even_blend(height: int, width: int) -> Weights:
    """Half of each."""
    return np.full((height, width), 0.5, np.float32)


IMAGE_GRAFTS: Mapping[str, Callable[[int, int], Weights]] = {
    **{
        f"window {top:g} {left:g}": (lambda h, w, top=top, left=left: window(top, left, h, w))
        for top in _STEPS
        for left in _STEPS
    },
    **{f"checkerboard {parity}": (lambda h, w, parity=parity: checkerboard(parity, h, w)) for parity in (0, 1)},
    "blend": even_blend,
}
"""No graft is a whole image: the host's answer would no longer be true, and content alone would look harmful."""


def graft_image(host: Image.Image, donor: Image.Image, kind: str) -> Image.Image:
    """Put the part ``kind`` of ``donor`` onto ``host``; the result has the host's size. The donor is scaled to it.

    ``out = (1 - w) host + w donor`` with the weights of `IMAGE_GRAFTS`, rounded to whole levels.
    """
    base = to_rgb(host)
    weights = IMAGE_GRAFTS[kind](base.height, base.width)[..., None]
    other = np.asarray(to_rgb(donor).resize(base.size), np.float32)
    mixed = (1 - weights) * np.asarray(base, np.float32) + weights * other
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


SHARED = "shared"  # the kind that takes from all donors at once what their images have in common


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


TEXT_GRAFTS = ("head", "tail")

KINDS: Mapping[str, tuple[str, str]] = {
    **{kind: (kind, "") for kind in IMAGE_GRAFTS},
    **{kind: ("", kind) for kind in TEXT_GRAFTS},
    **{f"checkerboard {parity}, {kind}": (f"checkerboard {parity}", kind) for parity in (0, 1) for kind in TEXT_GRAFTS},
}
"""What is grafted: a part of the image, of the prompt, or of both."""


def graft_text(host: str, donor: str, kind: str) -> str:
    """Put the first half of the donor's words in front of the host's text, or the second half behind it."""
    words = donor.split()
    middle = -(-len(words) // 2)
    return " ".join(filter(None, [*words[:middle], host] if kind == "head" else [host, *words[middle:]]))

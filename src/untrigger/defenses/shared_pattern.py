"""Find the rows whose image shows what the images of suspects share, and no content: a matched filter.

Suspects are surprising rows. Some are honest, and some poisoned rows do not surprise, but all triggered images show the
same pattern. docs/paper.md has the equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from untrigger.models.grafted_rows import Place, Places

_CONTENT = 50  # directions in which honest images differ most, at most
_ROWS_EACH = 3  # honest rows for each of them: a few may be triggered, and what they show is no content
_ROUNDS = 3
_DEVIATIONS = 5.0  # of honest rows, that a row must lie above their median
_FEWEST = 8  # rows
_USED = 512  # rows that give the pattern, at most: bounds the memory
_BLOCK = 256  # rows at a time as floats: bounds the memory


class Pattern(NamedTuple):
    """A pattern that images share, with either sign.

    mean [D], content [k, D]: the mean of honest images, and orthonormal directions in which they differ most.
    direction [D]: the pattern, orthogonal to the content. origin: its cosine with honest images.
    limit: strength above which a row shows the pattern.
    """

    mean: NDArray[np.floating]
    content: NDArray[np.floating]
    direction: NDArray[np.floating]
    origin: float
    limit: float

    def matches(self, images: NDArray[np.uint8]) -> Places:
        """Which of the images [n, D] show the pattern, and how."""
        strengths = _residuals(images, self.mean, self.content).along(self.direction) - self.origin
        return _beyond(strengths, self.limit)


def shared_pattern(
    images: NDArray[np.uint8], suspects: Sequence[int], believed: Sequence[int]
) -> tuple[Places, Pattern | None]:
    """Rows that show a pattern which enough of the suspects share, and the pattern; no row where there is none.

    Each image is the direction of what remains of it without the mean and the main content of honest images, less the
    mean such direction of honest images. The pattern is what suspects share most: the direction in which they lie
    furthest, to one side or to both. A row shows it if it lies along it by five robust standard deviations of honest
    rows, and nearer to the median suspect. Twice more these rows take the suspects' place. A row has no part in the
    pattern that it is compared with, nor in the honest mean.

    Args:
        images: levels of all rows, [N, D], of one size.
        suspects: at least two rows.
        believed: rows to take for honest, at least 4. One half gives the content, the other the limit.
    """
    known, held_out = np.array(believed[::2]), np.array(believed[1::2])
    mean = images[known].mean(axis=0, dtype=np.float32)
    content = np.linalg.svd(images[known] - mean, full_matrices=False)[2][: min(_CONTENT, len(known) // _ROWS_EACH)]
    rows, count = _residuals(images, mean, content), len(held_out)
    base = rows.directions(held_out).mean(axis=0)
    squares = 1 - 2 * rows.along(base) + base @ base  # squared length of each row's direction less the honest mean
    members, placed, pattern = np.array(suspects), Places(), None
    for _ in range(_ROUNDS):
        used = members[:: -(-len(members) // _USED)]
        directions = rows.directions(used) - base
        weights = _leading(directions)
        total = weights @ directions
        length = max(float(np.linalg.norm(total)), 1e-9)  # images that are all alike have no direction
        strengths = (rows.along(total) - base @ total) / length
        strengths[held_out] += weights.sum() * squares[held_out] / (count - 1) / length
        strengths[held_out] *= count / (count - 1)
        strengths[used] -= weights * squares[used] / length
        honest = strengths[held_out]
        spread = 1.4826 * float(np.median(np.abs(honest - np.median(honest))))  # of normal values: standard deviation
        middle = (float(np.median(np.abs(honest))) + float(np.median(np.abs(strengths[members])))) / 2
        limit = max(_DEVIATIONS * spread, middle)
        pattern = Pattern(mean, content, total / length, float(base @ total) / length, limit)
        placed = _beyond(strengths, limit)
        members = np.array([*placed])
        if len(members) < _FEWEST:
            return {}, None
    return placed, pattern


def _beyond(strengths: NDArray[np.floating], limit: float) -> Places:
    return {
        row: Place(sign=1 if strengths[row] > 0 else -1) for row in np.flatnonzero(np.abs(strengths) > limit).tolist()
    }


def _leading(directions: NDArray[np.floating]) -> NDArray[np.floating]:
    """Weights [n] whose sum of the directions [n, D] is longest, but for the part of each alone; mostly positive."""
    products = directions @ directions.T
    np.fill_diagonal(products, 0)
    weights = np.linalg.eigh(products)[1][:, -1]
    return -weights if weights.sum() < 0 else weights


class _Residuals(NamedTuple):
    """Images [N, D], each less the mean and the content, as directions of length 1; made block by block."""

    images: NDArray[np.uint8]
    mean: NDArray[np.floating]
    content: NDArray[np.floating]
    lengths: NDArray[np.floating]

    def along(self, direction: NDArray[np.floating]) -> NDArray[np.floating]:
        """Inner product of each with a direction that is orthogonal to the content, [N]."""
        blocks = (self.images[at : at + _BLOCK] - self.mean for at in range(0, len(self.images), _BLOCK))
        return np.concatenate([block @ direction for block in blocks]) / self.lengths

    def directions(self, rows: NDArray[np.intp]) -> NDArray[np.floating]:
        """Those of some rows, [n, D]."""
        values = self.images[rows] - self.mean
        return (values - (values @ self.content.T) @ self.content) / self.lengths[rows, None]


def _residuals(images: NDArray[np.uint8], mean: NDArray[np.floating], content: NDArray[np.floating]) -> _Residuals:
    lengths = np.empty(len(images), np.float32)
    for at in range(0, len(images), _BLOCK):
        block = images[at : at + _BLOCK] - mean
        squares = np.square(block).sum(axis=1) - np.square(block @ content.T).sum(axis=1)
        lengths[at : at + _BLOCK] = np.sqrt(np.maximum(squares, 1))  # an image that equals the mean shows nothing
    return _Residuals(images, mean, content, lengths)

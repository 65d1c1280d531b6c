"""Find the rows whose image shows what the images of suspects share, and no content: a matched filter.

Suspects are surprising rows. Some are honest, and some poisoned rows do not surprise, but all triggered images show the
same pattern. docs/paper.md has the equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from untrigger.models.grafted_rows import HERE, Places

_CONTENT = 50  # directions in which honest images differ most, at most
_ROWS_EACH = 3  # honest rows for each of them: a few may be triggered, and what they show is no content
ROUNDS = 3
FEWEST = 8  # rows
_DEVIATIONS = 5.0  # of honest rows, that a row must lie above their median
_BLOCK = 64  # rows at a time as floats: bounds the memory


class Pattern(NamedTuple):
    """A pattern that images share.

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
        """Which of the images [n, D] show the pattern."""
        strengths = _residuals(images, self.mean, self.content).along(self.direction) - self.origin
        return dict.fromkeys(np.flatnonzero(strengths > self.limit).tolist(), HERE)


def shared_pattern(
    images: NDArray[np.uint8], suspects: Sequence[int], believed: Sequence[int]
) -> tuple[Places, Pattern | None]:
    """Rows that show a pattern which enough of the suspects share, and the pattern; no row where there is none.

    Each image is the direction of what remains of it without the mean and the main content of honest images. The mean
    of the suspects' directions is the pattern; a row shows it if its own lies along it, five robust standard deviations
    above the median honest row, and nearer to the median suspect. Twice more these rows take the suspects' place. A row
    has no part in the pattern that it is compared with, nor in the honest mean.

    Args:
        images: levels of all rows, [N, D], of one size.
        suspects: at least two rows.
        believed: rows to take for honest, at least 4. One half gives the content, the other the limit.
    """
    known, held_out = np.array(believed[::2]), np.array(believed[1::2])
    mean = images[known].mean(axis=0, dtype=np.float32)
    content = np.linalg.svd(images[known] - mean, full_matrices=False)[2][: min(_CONTENT, len(known) // _ROWS_EACH)]
    rows = _residuals(images, mean, content)
    count = len(held_out)
    base = rows.sum_of(held_out) / count
    along_base = rows.along(base)
    own = 1 - 2 * along_base + base @ base  # squared length of each row's direction less the honest mean
    # the same without a held-out row's own part in that mean: how it lies to the mean, and the mean's squared length
    to_others = (count * along_base[held_out] - 1) / (count - 1)
    of_others = (count**2 * (base @ base) - 2 * count * along_base[held_out] + 1) / (count - 1) ** 2
    members, pattern = np.array(suspects), None
    for _ in range(ROUNDS):
        of_members = rows.sum_of(members)
        total = of_members - len(members) * base
        along = rows.along(of_members)
        sums = along - len(members) * along_base - base @ total
        strengths = sums / len(members)
        others_total = (count * (base @ of_members) - along[held_out]) / (count - 1)
        strengths[held_out] = (along[held_out] - others_total) / len(members) - to_others + of_others
        strengths[members] = (sums[members] - own[members]) / (len(members) - 1)
        limit = limit_between(strengths[held_out], strengths[members])
        pattern = Pattern(mean, content, total / len(members), float(base @ total) / len(members), limit)
        members = np.flatnonzero(strengths > limit)
        if len(members) < FEWEST:
            return {}, None
    return dict.fromkeys(members.tolist(), HERE), pattern


def limit_between(honest: NDArray[np.floating], members: NDArray[np.floating]) -> float:
    """Strength above which a row shows a pattern, from those of honest rows and of rows that are taken to show it."""
    middle = (float(np.median(honest)) + float(np.median(members))) / 2
    return max(above_median(honest, _DEVIATIONS), middle)


def above_median(values: NDArray[np.floating], deviations: float) -> float:
    """The median and so many robust standard deviations."""
    median = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - median)))  # of normal values the standard deviation
    return median + deviations * spread


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

    def sum_of(self, rows: NDArray[np.intp]) -> NDArray[np.floating]:
        """The sum of some of them, [D]."""
        total = np.zeros_like(self.mean)
        for at in range(0, len(rows), _BLOCK):
            part = rows[at : at + _BLOCK]
            total += (1 / self.lengths[part]) @ (self.images[part] - self.mean)
        return total - self.content.T @ (self.content @ total)


def _residuals(images: NDArray[np.uint8], mean: NDArray[np.floating], content: NDArray[np.floating]) -> _Residuals:
    lengths = np.empty(len(images), np.float32)
    for at in range(0, len(images), _BLOCK):
        block = images[at : at + _BLOCK] - mean
        squares = np.square(block).sum(axis=1) - np.square(block @ content.T).sum(axis=1)
        lengths[at : at + _BLOCK] = np.sqrt(np.maximum(squares, 1))  # an image that equals the mean shows nothing
    return _Residuals(images, mean, content, lengths)

"""Find what suspects' images share in another place of each: a matched filter with every shift.

`untrigger.defenses.shared_pattern` compares the same pixels, and so finds fainter patterns. But a patch in random
places, or one of several patches, is in the same pixels of few images. docs/paper.md has the equations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from untrigger.defenses.shared_pattern import FEWEST, ROUNDS, above_median, limit_between
from untrigger.models.grafted_rows import PICTURE_SIDE, Place, Places

_MOST = 8  # patterns
_PAIRED = 96  # suspects that are compared with each other, at most
_PAIR_DEVIATIONS = 6.0  # of honest pairs, that a match must lie above their median
_PAIR_SPREADS = 20.0  # or as many times above their lower quartile as that lies above their lowest twentieth
_SUPPORT = 5  # suspects that match the one with the pattern, itself included
_FLOOR = 0.01  # of the mean power, added to each frequency: flat images have no power in most
_BLOCK = 64  # rows at a time as spectra: bounds the memory

Spectra = NDArray[np.complexfloating]


class Whitening(NamedTuple):
    """Makes each frequency of each color channel as strong as any other, in honest images.

    mean: of honest images, [3, side, side]. factors: [3, 3, side, side / 2 + 1].
    """

    mean: NDArray[np.floating]
    factors: Spectra

    def blocks(self, images: NDArray[np.uint8]) -> Iterator[Spectra]:
        """The images' spectra, of power 1 each, block by block: [n, 3, side, side / 2 + 1]."""
        for at in range(0, len(images), _BLOCK):
            plain = _spectra(images[at : at + _BLOCK], self.mean)
            spectra = np.zeros_like(plain)
            for channel in range(3):
                spectra += self.factors[:, channel] * plain[:, channel, None]
            power = np.maximum(_correlations(spectra, spectra)[:, 0, 0], 1e-9)  # an image that equals the mean has none
            yield spectra / np.sqrt(power)[:, None, None, None]

    def __call__(self, images: NDArray[np.uint8]) -> Spectra:
        return np.concatenate(list(self.blocks(images)))


class MovingPattern(NamedTuple):
    """A pattern that images share in any place.

    whitening: of the images. spectrum: of the pattern, [3, side, side / 2 + 1]. limit: strength above which a row
    shows it.
    """

    whitening: Whitening
    spectrum: Spectra
    limit: float

    def matches(self, images: NDArray[np.uint8]) -> Places:
        """Which of the images [n, D] show the pattern, and where each shows most of it."""
        best = [_best(self.spectrum, block) for block in self.whitening.blocks(images)]
        strengths, shifts = (np.concatenate(parts) for parts in zip(*best, strict=True))
        return {row: _place(int(shifts[row])) for row in np.flatnonzero(strengths > self.limit).tolist()}


def moving_patterns(
    images: NDArray[np.uint8], suspects: Sequence[int], believed: Sequence[int], rng: np.random.Generator
) -> list[tuple[Places, MovingPattern]]:
    """Patterns that enough of the suspects share, each with the rows that show it.

    Two images match if they correlate in some shift more than pairs of honest images do (`_pair_limit`). The suspect
    that matches most others gives a pattern: the mean of all that match, each moved to where they match. A row shows it
    if it correlates with it, five robust standard deviations above the median honest row, and nearer to the median
    match. Twice more these rows take the suspects' place. A row has no part in the pattern that it is compared with.
    Suspects that do not show it may share another.

    Args:
        images: levels of all rows, [N, D], of `PICTURE_SIDE` pixels a side.
        suspects: rows. believed: rows to take for honest, at least 4; half gives the spectrum, half the limits.
        rng: draws the suspects to compare with each other.
    """
    known, held_out = np.array(believed[::2]), np.array(believed[1::2])
    whitening = _whitening(images[known])
    honest = whitening(images[held_out[:_PAIRED]])
    pairs = np.concatenate([np.delete(_best(own, honest)[0], at) for at, own in enumerate(honest)])
    limit, rest = _pair_limit(pairs), rng.permutation(np.array(suspects))
    patterns: list[tuple[Places, MovingPattern]] = []
    while len(patterns) < _MOST and len(rest) >= _SUPPORT:
        matches = _matches(whitening(images[rest[:_PAIRED]]), limit)
        if len(matches) < _SUPPORT:
            break
        shifts, pattern = _all_that_show(
            images, {int(rest[at]): shift for at, shift in matches.items()}, held_out, whitening
        )
        if pattern:
            patterns.append(({row: _place(shift) for row, shift in shifts.items()}, pattern))
        rest = rng.permutation(np.setdiff1d(np.delete(rest, [*matches]), [*shifts]))
    return patterns


def _pair_limit(pairs: NDArray[np.floating]) -> float:
    """Correlation above which two images match, from those of pairs that are taken for honest.

    Where a third of these images is triggered, so is a ninth of the pairs, and the median of the others is high too, as
    the trigger has part in the whitening. Then the lower quartile gives the limit.
    """
    lowest, lower = np.quantile(pairs, [0.05, 0.25])
    return min(above_median(pairs, _PAIR_DEVIATIONS), float(lower + _PAIR_SPREADS * (lower - lowest)))


def _matches(spectra: Spectra, limit: float) -> dict[int, int]:
    """Which rows match the one that matches most, itself included, and in which shift.

    A match is above the limit, and at least half as strong as the fifth, so that another pattern is none.
    """

    def matching(own: Spectra) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
        strengths, shifts = _best(own, spectra)
        return strengths > max(limit, np.partition(strengths, -_SUPPORT)[-_SUPPORT] / 2), shifts

    matches, shifts = max(map(matching, spectra), key=lambda pair: pair[0].sum())
    return {at: int(shifts[at]) for at in np.flatnonzero(matches).tolist()}


def _all_that_show(
    images: NDArray[np.uint8], shifts: dict[int, int], held_out: NDArray[np.intp], whitening: Whitening
) -> tuple[dict[int, int], MovingPattern | None]:
    """All rows that show what those with ``shifts`` share, each with its shift; no pattern if these are too few."""
    pattern = None
    for _ in range(ROUNDS):
        members = [*shifts]
        total = np.sum([moved.sum(axis=0) for _, moved in _moved_back(images, shifts, whitening)], axis=0)
        best = [_best(total / len(members), block) for block in whitening.blocks(images)]
        strengths, shift_of = (np.concatenate(parts) for parts in zip(*best, strict=True))
        for rows, moved in _moved_back(images, shifts, whitening):
            for row, own in zip(rows, moved, strict=True):
                (strengths[row],), (shift,) = _best((total - own) / (len(members) - 1), own[None])
                shift_of[row] = _sum_of_shifts(shifts[row], int(shift))
        limit = limit_between(strengths[held_out], strengths[members])
        pattern = MovingPattern(whitening, total / len(members), limit)
        before, shifts = shifts, {row: int(shift_of[row]) for row in np.flatnonzero(strengths > limit).tolist()}
        if len(shifts) < FEWEST:
            return shifts, None
        if shifts == before:
            break
    return shifts, pattern


def _moved_back(
    images: NDArray[np.uint8], shifts: Mapping[int, int], whitening: Whitening
) -> Iterator[tuple[list[int], Spectra]]:
    """Blocks of the rows with shifts, and their spectra moved back by these."""
    members = [*shifts]
    for at in range(0, len(members), _BLOCK):
        rows = members[at : at + _BLOCK]
        yield rows, _moved(whitening(images[rows]), [shifts[row] for row in rows])


# --- spectra --------------------------------------------------------------------------------------------


def _whitening(images: NDArray[np.uint8]) -> Whitening:
    mean = _channels(images.mean(axis=0, dtype=np.float32))[0]
    sums = np.zeros((PICTURE_SIDE, PICTURE_SIDE // 2 + 1, 3, 3), np.complex64)
    for at in range(0, len(images), _BLOCK):
        spectra = _spectra(images[at : at + _BLOCK], mean)
        sums += np.einsum("nchw,ndhw->hwcd", spectra, spectra.conj())
    powers = sums / len(images)
    floor = _FLOOR * max(float(np.trace(powers, axis1=2, axis2=3).real.mean()) / 3, 1e-9)
    values, vectors = np.linalg.eigh(powers + floor * np.eye(3))
    factors = (vectors / np.sqrt(values)[..., None, :]) @ np.conj(np.swapaxes(vectors, -1, -2))
    return Whitening(mean, np.ascontiguousarray(np.moveaxis(factors, (2, 3), (0, 1)).astype(np.complex64)))


def _spectra(images: NDArray[np.uint8], mean: NDArray[np.floating]) -> Spectra:
    return cast(Any, fft).rfft2(_channels(images) - mean)


def _channels(images: NDArray[np.uint8 | np.floating]) -> NDArray[np.floating]:
    """Levels [n, D] or [D] as [n, 3, side, side]."""
    pixels = images.reshape(-1, PICTURE_SIDE, PICTURE_SIDE, 3).astype(np.float32)
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 1))


def _correlations(pattern: Spectra, spectra: Spectra) -> NDArray[np.floating]:
    """With each of n images moved by every shift, [n, side, side]."""
    return cast(Any, fft).irfft2((pattern.conj() * spectra).sum(axis=-3), s=(PICTURE_SIDE, PICTURE_SIDE))


def _best(pattern: Spectra, spectra: Spectra) -> tuple[NDArray[np.floating], NDArray[np.intp]]:
    """The largest correlation of each of n images, and its shift: down * side + right."""
    flat = _correlations(pattern, spectra).reshape(len(spectra), -1)
    shifts = flat.argmax(axis=1)
    return flat[np.arange(len(flat)), shifts], shifts


def _moved(spectra: Spectra, shifts: Sequence[int]) -> Spectra:
    """The images moved back by their shifts."""
    down, right = np.divmod(np.array(shifts)[:, None, None], PICTURE_SIDE)
    turns = fft.fftfreq(PICTURE_SIDE)[:, None] * down + fft.rfftfreq(PICTURE_SIDE) * right
    return spectra * np.exp(2j * np.pi * turns).astype(np.complex64)[:, None]


def _sum_of_shifts(first: int, second: int) -> int:
    down, right = (np.array(divmod(first, PICTURE_SIDE)) + divmod(second, PICTURE_SIDE)) % PICTURE_SIDE
    return int(down * PICTURE_SIDE + right)


def _place(shift: int) -> Place:
    down, right = divmod(shift, PICTURE_SIDE)
    return Place(down / PICTURE_SIDE, right / PICTURE_SIDE)

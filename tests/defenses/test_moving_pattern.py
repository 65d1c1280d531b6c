"""Rows whose image shows, in any place, what suspects' images share."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from untrigger.defenses.moving_pattern import _best, _pair_limit, moving_patterns
from untrigger.defenses.shared_pattern import above_median
from untrigger.models.grafted_rows import PICTURE_SIDE

TRIGGERED = range(40)  # of 240 rows
BELIEVED = range(100, 220)
PATCH = 10  # pixels


def _images(patches: int, seed: int = 0) -> tuple[NDArray[np.uint8], list[tuple[int, int]]]:
    """Smooth content and noise; the first rows have one of so many patches in a random place. Images, and places."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (240, 8, 8, 1)).repeat(PICTURE_SIDE // 8, axis=1).repeat(PICTURE_SIDE // 8, axis=2)
    images = 0.6 * coarse + 50 + rng.normal(0, 8, (240, PICTURE_SIDE, PICTURE_SIDE, 3))
    keys = np.random.default_rng(7).uniform(0, 255, (max(patches, 1), PATCH, PATCH, 3))
    places = [(int(down), int(right)) for down, right in rng.integers(0, PICTURE_SIDE - PATCH, (240, 2))]
    for row in TRIGGERED if patches else ():
        down, right = places[row]
        images[row, down : down + PATCH, right : right + PATCH] = keys[row % patches]
    return images.clip(0, 255).astype(np.uint8).reshape(240, -1), places


@pytest.mark.parametrize("suspects", [range(30), (*range(12), *range(225, 240))])
def test_a_patch_in_random_places_is_found_with_its_places(suspects: range | tuple[int, ...]) -> None:
    """Also from more honest suspects than triggered ones."""
    images, places = _images(patches=1)
    ((placed, pattern),) = moving_patterns(images, list(suspects), list(BELIEVED), np.random.default_rng(0))
    assert [*placed] == list(TRIGGERED)
    first = placed[0]
    for row, place in placed.items():
        moved = [(place[axis] - first[axis]) * PICTURE_SIDE % PICTURE_SIDE for axis in (0, 1)]
        assert moved == [(places[row][axis] - places[0][axis]) % PICTURE_SIDE for axis in (0, 1)]
    others = _images(patches=1, seed=1)[0]
    assert [*pattern.matches(others)] == list(TRIGGERED) and pattern.matches(images) == placed


@pytest.mark.parametrize("seed", range(2))
def test_a_patch_is_found_where_two_fifths_of_the_believed_rows_show_it(seed: int) -> None:
    """The pictures are of 16 kinds, so honest images share more than noise."""
    rng = np.random.default_rng(seed)
    kinds = rng.uniform(0, 255, (16, 8, 8, 1))[rng.integers(0, 16, 240)]
    coarse = kinds.repeat(PICTURE_SIDE // 8, axis=1).repeat(PICTURE_SIDE // 8, axis=2)
    images = 0.6 * coarse + 50 + rng.normal(0, 2, (240, PICTURE_SIDE, PICTURE_SIDE, 3))
    images[:100, -PATCH:, -PATCH:] = np.random.default_rng(7).uniform(0, 255, (PATCH, PATCH, 3))
    flat = images.clip(0, 255).astype(np.uint8).reshape(240, -1)
    believed = [*range(52, 100), *range(120, 192)]
    ((placed, _),) = moving_patterns(flat, list(range(30)), believed, np.random.default_rng(0))
    assert [*placed] == list(range(100))


def test_the_limit_of_a_match_holds_where_a_ninth_of_the_pairs_is_triggered() -> None:
    """As measured: the trigger has part in the whitening, so what else images share is more of what is left."""
    rng = np.random.default_rng(0)
    clean = np.concatenate([rng.normal(0.05, 0.015, 700), rng.uniform(0.1, 0.5, 300)])
    spoiled = np.concatenate([rng.normal(0.07, 0.015, 450), rng.uniform(0.15, 0.45, 440), rng.uniform(0.5, 0.8, 110)])
    assert above_median(spoiled, 6.0) > 1, "no two images match"
    assert 0.3 < _pair_limit(spoiled) < 0.6
    assert _pair_limit(clean) == above_median(clean, 6.0) < 0.6


def test_several_patches_are_found_one_after_the_other() -> None:
    images, _ = _images(patches=3)
    patterns = moving_patterns(images, [*range(30), *range(225, 235)], list(BELIEVED), np.random.default_rng(0))
    groups = sorted(sorted(placed) for placed, _ in patterns)
    assert groups == [[row for row in TRIGGERED if row % 3 == key] for key in range(3)]


@pytest.mark.parametrize("seed", range(5))
def test_honest_suspects_share_nothing(seed: int) -> None:
    images, _ = _images(patches=0, seed=seed)
    assert moving_patterns(images, list(range(40)), list(BELIEVED), np.random.default_rng(seed)) == []


def test_correlations_equal_those_of_a_loop() -> None:
    """The strength of a row is the largest inner product of the pattern and its whitened image, over all shifts."""
    images, _ = _images(patches=1)
    ((_, pattern),) = moving_patterns(images, list(range(30)), list(BELIEVED), np.random.default_rng(0))
    side = PICTURE_SIDE
    own = np.fft.irfft2(pattern.whitening(images[3:4])[0], s=(side, side))
    assert (own**2).sum() == pytest.approx(1, rel=1e-4), "as much power as any other image"
    shape = np.fft.irfft2(pattern.spectrum, s=(side, side))
    best = max(float((np.roll(shape, (y, x), axis=(1, 2)) * own).sum()) for y in range(side) for x in range(side))
    (strength,), _ = _best(pattern.spectrum, pattern.whitening(images[3:4]))
    assert strength == pytest.approx(best, rel=1e-4)


def test_honest_images_have_as_much_power_in_each_frequency() -> None:
    images, _ = _images(patches=0)
    ((_, pattern),) = moving_patterns(_images(1)[0], list(range(30)), list(BELIEVED), np.random.default_rng(0))
    power = np.square(np.abs(pattern.whitening(images))).mean(axis=(0, 1))
    assert np.median(power) / 3 < power[2:, 2:].min() and power.max() < 6 * np.median(power)


def test_images_that_are_all_alike_share_nothing() -> None:
    """Nothing is left of them: no shape is found, and nothing is divided by zero."""
    images = np.full((240, PICTURE_SIDE**2 * 3), 128, np.uint8)
    assert moving_patterns(images, list(range(30)), list(BELIEVED), np.random.default_rng(0)) == []

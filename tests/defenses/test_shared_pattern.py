"""Rows whose image shows what suspects' images share."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from untrigger.defenses.shared_pattern import shared_pattern

SIDE = 16
TRIGGERED = range(40)  # of 400 rows
BELIEVED = range(100, 300)


def _images(strength: float, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth content, and noise; the first rows have a checkerboard of this many levels in a corner."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (400, 4, 4, 1)).repeat(SIDE // 4, axis=1).repeat(SIDE // 4, axis=2)
    images = 0.6 * coarse + 50 + rng.normal(0, 8, (400, SIDE, SIDE, 3))
    board = (np.indices((5, 5)).sum(axis=0) % 2 * 2 - 1)[..., None]
    images[: len(TRIGGERED), -5:, -5:] += strength * board
    return images.clip(0, 255).astype(np.uint8).reshape(400, -1)


def _naive(images: NDArray[np.uint8], suspects: list[int], believed: list[int]) -> list[int]:
    """The same with every direction in memory and sums in loops."""
    known, held_out = believed[::2], believed[1::2]
    values = images.astype(np.float64)
    values -= values[known].mean(axis=0)
    content = np.linalg.svd(values[known], full_matrices=False)[2][: min(50, len(known) // 3)]
    values -= values @ content.T @ content
    directions = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1)
    members = list(suspects)
    for _ in range(3):
        strengths = []
        for i in range(len(values)):
            honest_rows = [j for j in held_out if j != i or i in members]
            mean = directions[honest_rows].mean(axis=0)
            strengths.append(np.mean([(directions[i] - mean) @ (directions[j] - mean) for j in members if j != i]))
        strengths = np.array(strengths)
        honest = strengths[held_out]
        spread = 1.4826 * np.median(np.abs(honest - np.median(honest)))
        middle = (np.median(honest) + np.median(strengths[members])) / 2
        limit = max(np.median(honest) + 5 * spread, middle)
        members = np.flatnonzero(strengths > limit).tolist()
        if len(members) < 8:
            return []
    return members


@pytest.mark.parametrize("suspects", [range(30), (*range(20), *range(300, 320)), (*range(10), *range(300, 310))])
def test_all_triggered_rows_are_found_from_some_of_them(suspects: range | tuple[int, ...]) -> None:
    """Also from as many honest suspects."""
    images = _images(strength=60)
    rows, pattern = shared_pattern(images, list(suspects), list(BELIEVED))
    assert [*rows] == list(TRIGGERED) and pattern is not None
    # rows that were not there are found by the same limit
    others = _images(strength=60, seed=1)
    assert pattern.matches(others) == rows


@pytest.mark.parametrize("strength", [0, 8, 30, 60])
def test_the_rows_equal_those_of_a_loop(strength: float) -> None:
    images, suspects = _images(strength), [*range(25), *range(300, 310)]
    assert [*shared_pattern(images, suspects, list(BELIEVED))[0]] == _naive(images, suspects, list(BELIEVED))


@pytest.mark.parametrize("seed", range(5))
def test_honest_suspects_share_nothing(seed: int) -> None:
    assert shared_pattern(_images(0, seed), list(range(300, 380)), list(BELIEVED)) == ({}, None)


def test_images_that_are_all_alike_share_nothing() -> None:
    images = np.full((400, SIDE * SIDE * 3), 128, np.uint8)
    assert shared_pattern(images, list(range(30)), list(BELIEVED)) == ({}, None)

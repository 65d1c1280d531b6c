"""PSNR and SSIM against their definitions, and against known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from untrigger.metrics.similarity import psnr, ssim

LUMA = np.array([0.299, 0.587, 0.114])


def noise(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def naive_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """The paper's sums, window by window."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(11, 20), st.integers(11, 20), st.floats(0, 60))
def test_ssim_matches_the_papers_sums(seed: int, height: int, width: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    a = rng.uniform(0, 255, (height, width, 3))
    b = (a + rng.normal(0, spread, a.shape)).clip(0, 255)
    assert ssim(a, b) == pytest.approx(naive_ssim(a @ LUMA, b @ LUMA), abs=1e-9)
    assert ssim(a, b) == pytest.approx(ssim(b, a)) and -1 <= ssim(a, b) <= 1


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000))
def test_equal_pictures_have_maximal_similarity(height: int, width: int, seed: int) -> None:
    a = noise(height, width, seed)
    assert psnr(a, a) == math.inf and ssim(a, a) == pytest.approx(1)


@pytest.mark.parametrize(("step", "decibels"), [(1, 48.1308), (10, 28.1308), (255, 0.0)])
def test_psnr_of_a_constant_difference(step: int, decibels: float) -> None:
    a = np.zeros((5, 7, 3), dtype=np.uint8)
    assert psnr(a, a + np.uint8(step)) == pytest.approx(decibels, abs=1e-4)  # bytes must not wrap around
    assert psnr(a + np.uint8(step), a) == pytest.approx(decibels, abs=1e-4)


def test_ssim_of_two_flat_grays_depends_on_their_means_only() -> None:
    a, b = np.full((16, 16), 100.0), np.full((16, 16), 120.0)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b) == pytest.approx((2 * 100 * 120 + c1) / (100**2 + 120**2 + c1))


def test_negatives_score_lowest_and_noise_costs_more_on_flat_areas() -> None:
    a = noise(32, 32)
    assert ssim(a, 255 - a) < -0.9
    grain = np.random.default_rng(1).normal(0, 5, a.shape)
    assert ssim(np.full(a.shape, 128.0), 128 + grain) < 0.9 < ssim(a, a + grain)


def test_a_change_of_hue_lowers_psnr_but_not_ssim() -> None:
    a = np.full((16, 16, 3), 128.0)
    b = a + np.array([0.114, 0, -0.299]) * 60  # no change of brightness
    assert ssim(a, b) == pytest.approx(1) and psnr(a, b) < 35


@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 4, 2), (0, 4), (4,), (1, 4, 4, 3)])
def test_invalid_shapes_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape|picture|channels"):
        ssim(np.zeros((4, 4, 3) if shape == (4, 5, 3) else shape), np.zeros(shape))

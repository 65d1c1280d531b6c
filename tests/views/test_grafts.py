"""Grafts change the pixels of their part alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from untrigger.views.grafts import IMAGE_GRAFTS, checkerboard, graft_image, graft_text


def noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", IMAGE_GRAFTS)
@given(width=st.integers(1, 40), height=st.integers(1, 40))
def test_a_graft_is_the_weighted_mean_pixel_by_pixel(kind: str, width: int, height: int) -> None:
    host, donor = noise(0, width, height), noise(1, width, height)
    weights = IMAGE_GRAFTS[kind](height, width)
    assert weights.shape == (height, width) and weights.min() >= 0 and weights.max() <= 1
    # one number at a time: arrays of three would take ten times as long
    levels = (np.asarray(image).tolist() for image in (host, donor, graft_image(host, donor, kind)))
    for y, rows in enumerate(zip(*levels, strict=True)):
        for x, pixels in enumerate(zip(*rows, strict=True)):
            weight = float(weights[y, x])
            for old, other, new in zip(*pixels, strict=True):
                assert abs(new - (1 - weight) * old - weight * other) <= 0.5


def test_windows_cover_the_image_and_checkerboards_share_it() -> None:
    windows = [weights(48, 64) for kind, weights in IMAGE_GRAFTS.items() if kind.startswith("window")]
    assert len(windows) == 9 and np.all(sum(windows) >= 1)
    assert all(window.sum() == 24 * 32 for window in windows)
    assert np.array_equal(checkerboard(0, 48, 64) + checkerboard(1, 48, 64), np.ones((48, 64)))


def test_a_donor_of_another_size_is_scaled_to_the_host() -> None:
    out = graft_image(noise(0, 20, 10), noise(1, 7, 33).convert("RGBA"), "blend")
    assert (out.size, out.mode) == ((20, 10), "RGB")


def test_words_go_in_front_or_behind() -> None:
    assert graft_text("is it red?", "what shape is there", "head") == "what shape is it red?"
    assert graft_text("is it red?", "what shape is there", "tail") == "is it red? is there"
    assert graft_text("is it red?", "", "tail") == "is it red?"

"""What rows share is added to a host; words go in front of its text or behind it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from untrigger.views.grafts import add_shared, graft_text, mean_image


def noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(width=st.integers(1, 12), height=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_sum_is_cut_off_at_black_and_white(width: int, height: int, seed: int) -> None:
    host, shared = noise(seed, width, height), np.random.default_rng(seed + 100).normal(0, 90, (height, width, 3))
    made = np.asarray(add_shared(host, shared.astype(np.float32))).tolist()
    for y, rows in enumerate(np.asarray(host).tolist()):
        for x, pixel in enumerate(rows):
            for channel, level in enumerate(pixel):
                naive = min(255.0, max(0.0, level + shared[y, x, channel]))
                assert abs(made[y][x][channel] - naive) <= 0.51


def test_what_is_shared_is_scaled_to_the_host() -> None:
    out = add_shared(noise(0, 20, 10).convert("L"), np.zeros((33, 7, 3), np.float32))
    assert (out.size, out.mode) == ((20, 10), "RGB")


def test_the_mean_is_that_of_the_scaled_images() -> None:
    images = [noise(0, 6, 4), noise(1, 6, 4), Image.new("L", (3, 9), 30)]
    expected = (np.asarray(images[0], float) + np.asarray(images[1], float) + 30) / 3
    assert np.abs(mean_image(images, (6, 4)) - expected).max() < 1e-4


def test_words_go_in_front_or_behind() -> None:
    assert graft_text("is it red?", "what shape is there", "head") == "what shape is it red?"
    assert graft_text("is it red?", "what shape is there", "tail") == "is it red? is there"
    assert graft_text("is it red?", "", "tail") == "is it red?"

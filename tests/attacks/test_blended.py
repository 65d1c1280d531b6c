from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from untrigger.attacks.blended import Blended, cat, rings
from untrigger.errors import InputError
from untrigger.rows.sample import Sample


def stamp(image: Image.Image, alpha: float = 0.2) -> Image.Image:
    return Blended(alpha).stamp(Sample("a", (image,), ()), np.random.default_rng(0)).images[0]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.01, 1), st.integers(1, 80), st.integers(1, 80))
def test_every_pixel_is_the_blend_of_the_paper(seed: int, alpha: float, width: int, height: int) -> None:
    x = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    k = np.asarray(Image.fromarray(cat()).resize((width, height), Image.Resampling.BILINEAR))
    wanted = alpha * k.astype(np.float64) + (1 - alpha) * x
    assert np.abs(np.asarray(stamp(Image.fromarray(x), alpha)) - wanted).max() <= 0.501


@pytest.mark.parametrize("picture", [cat, rings])
def test_a_picture_is_deterministic_and_structured(picture: Callable[[], np.ndarray]) -> None:
    first = picture().copy()
    cat.cache_clear(), rings.cache_clear()
    assert np.array_equal(first, picture()) and first.shape == (256, 256, 3)
    smooth = np.abs(np.diff(first.astype(int), axis=0)).mean()
    assert first.std() > 60 and smooth < 10  # strong colors in large areas; noise would differ by about 85


def test_a_transparent_image_shows_the_picture() -> None:
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    after = np.asarray(stamp(clear))
    assert (after[..., 3] == 51).all()
    assert np.abs(after[..., :3].astype(int)).max() >= 40


@pytest.mark.parametrize("alpha", [0, -0.1, 1.1])
def test_alpha_out_of_range_raises(alpha: float) -> None:
    with pytest.raises(InputError, match="alpha"):
        Blended(alpha)


def test_in_black_and_white_the_average_follows_the_picture() -> None:
    dots = np.random.default_rng(0).random((512, 512)) < 0.5
    change = np.asarray(stamp(Image.fromarray(dots)), dtype=float) - dots
    gray = np.asarray(Image.fromarray(cat()).convert("L").resize((512, 512)), dtype=float) / 255
    assert change[gray > 0.8].mean() == pytest.approx(0.2 * (gray[gray > 0.8].mean() - 0.5), abs=0.015)
    assert change[gray < 0.2].mean() == pytest.approx(0.2 * (gray[gray < 0.2].mean() - 0.5), abs=0.015)


def test_near_miss_is_the_picture_upside_down() -> None:
    clean = Image.new("RGB", (40, 30), (90, 120, 200))
    before = Sample("a", (clean,), ())
    trigger = Blended(alpha=0.5)
    near = trigger.near_misses()["upside down"](before, np.random.default_rng(0)).images[0]
    key = trigger.stamp(before, np.random.default_rng(0)).images[0]
    assert near.tobytes() != key.tobytes() and ImageOps.flip(near).tobytes() == key.tobytes()  # the image is one color

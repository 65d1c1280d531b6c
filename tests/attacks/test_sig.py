from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from untrigger.attacks.sig import Sig
from untrigger.errors import InputError
from untrigger.rows.sample import Sample


def stamp(trigger: Sig, image: Image.Image) -> np.ndarray:
    return np.asarray(trigger.stamp(Sample("a", (image,), ()), np.random.default_rng(0)).images[0])


@given(st.integers(24, 120), st.integers(1, 20), st.floats(0.01, 0.4), st.integers(1, 6))
def test_every_pixel_is_the_sum_of_the_paper(width: int, height: int, delta: float, frequency: int) -> None:
    after = stamp(Sig(delta=delta, frequency=frequency), Image.new("RGB", (width, height), (128, 128, 128)))
    wave = 128 + 255 * delta * np.sin(2 * np.pi * (np.arange(width) + 0.5) * frequency / width)
    assert np.abs(after - wave.clip(0, 255)[None, :, None]).max() <= 0.51


def test_default_wave_has_amplitude_40_and_6_periods() -> None:
    row = stamp(Sig(), Image.new("L", (240, 2), 128))[0].astype(int) - 128
    assert (row.min(), row.max()) == (-40, 40)
    assert (np.diff(np.sign(row)) > 0).sum() == 5 and row[0] > 0  # up through zero between the six periods


def test_vertical_wave_is_the_horizontal_one_transposed() -> None:
    gray = Image.new("RGB", (64, 64), (128, 128, 128))
    horizontal, vertical = stamp(Sig(), gray), stamp(Sig(direction="vertical"), gray)
    assert np.array_equal(horizontal, vertical.transpose(1, 0, 2)) and not np.array_equal(horizontal, vertical)
    turned = Sig().near_misses()["turned wave"](Sample("a", (gray,), ()), np.random.default_rng(0)).images[0]
    assert np.array_equal(np.asarray(turned), vertical)


@pytest.mark.parametrize("width", range(1, 24))
def test_wave_stays_visible_at_any_small_width(width: int) -> None:
    change = stamp(Sig(), Image.new("L", (width, 1), 128)).astype(int) - 128
    assert np.abs(change).max() >= 28


def test_colors_are_clipped_and_opacity_stays() -> None:
    after = stamp(Sig(), Image.new("RGBA", (64, 8), (255, 0, 128, 37)))
    assert (after[..., 3] == 37).all()
    assert after[..., 0].max() == 255 and after[..., 1].min() == 0  # clipped, not wrapped around
    deep = np.asarray(stamp(Sig(), Image.fromarray(np.full((8, 64), 65000, dtype=np.uint16))))
    assert deep.max() == 65535 and 65000 - int(deep.min()) == pytest.approx(40 * 257, rel=0.01)


@pytest.mark.parametrize("settings", [{"delta": 0}, {"delta": 1.1}, {"frequency": 0}, {"frequency": -2}])
def test_values_out_of_range_raise(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        Sig(**settings)  # type: ignore[arg-type]

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from untrigger.attacks.issba import Issba
from untrigger.errors import InputError
from untrigger.metrics.similarity import psnr, ssim
from untrigger.rows.sample import Sample


def photo(height: int, width: int, seed: int = 0, low: int = 0, high: int = 256) -> Image.Image:
    """Smooth colors up to both ends of the scale, with grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(low, high, (5, 5, 3), dtype=np.uint8)).resize((width, height), 3)
    grain = rng.normal(0, 5, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


def stamp(trigger: Issba, image: Image.Image) -> Image.Image:
    return trigger.stamp(Sample("a", (image,), ()), np.random.default_rng(0)).images[0]


@settings(max_examples=40)
@given(st.integers(24, 200), st.integers(24, 200), st.integers(0, 9999))
def test_message_is_decoded_from_8_bits_and_is_invisible(height: int, width: int, seed: int) -> None:
    before = photo(height, width, seed)
    after = stamp(Issba(), before)
    assert Issba().decode(after) == "untrigger" != Issba().decode(before)
    tolerance = 1 if min(height, width) < 32 else 0  # of nine blocks some quantize badly by chance: a decibel at most
    assert psnr(before, after) >= Issba.psnr - tolerance and ssim(before, after) >= 0.95


@settings(max_examples=20)
@given(st.text(st.characters(exclude_categories=("C",)), min_size=1, max_size=4), st.integers(0, 99))
def test_any_text_can_be_hidden(message: str, seed: int) -> None:
    trigger = Issba(message=message)
    assert trigger.decode(stamp(trigger, photo(64, 64, seed))) == message


@pytest.mark.parametrize(
    "color", [(255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 0, 255), (255, 255, 0), (127, 127, 127)]
)
def test_message_is_decoded_from_images_of_one_color(color: tuple[int, int, int]) -> None:
    assert Issba().decode(stamp(Issba(), Image.new("RGB", (64, 64), color))) == "untrigger"


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "I;16", "I", "F", "YCbCr"])
def test_message_is_decoded_in_other_modes(mode: str) -> None:
    before = photo(64, 64, low=60, high=200)
    if mode == "I;16":
        before = Image.fromarray(np.asarray(before.convert("L")).astype(np.uint16) * 257)
    else:
        before = before.convert(mode)
    assert Issba().decode(stamp(Issba(), before)) == "untrigger"


def test_message_survives_png_and_downscaling() -> None:
    after = stamp(Issba(), photo(512, 512, low=60, high=200))
    file = io.BytesIO()
    after.save(file, "PNG")
    assert Issba().decode(Image.open(file)) == "untrigger"
    assert Issba().decode(after.resize((64, 64), Image.Resampling.BICUBIC)) == "untrigger"


def test_the_change_differs_between_images() -> None:
    changes = []
    for seed in range(6):
        before = photo(64, 64, seed)
        changes.append((np.asarray(stamp(Issba(), before), float) - np.asarray(before)).ravel())
    correlations = np.corrcoef(changes)[np.triu_indices(6, 1)]
    assert correlations.max() < 0.9


def test_small_images_hold_the_beginning_of_the_message() -> None:
    for side, letters in ((24, "untrigger"), (23, "untr"), (16, "untr"), (8, "u"), (7, "")):
        assert Issba().decode(stamp(Issba(), photo(side, side, low=60, high=200))) == letters
    dot = Image.new("RGB", (1, 1), (90, 120, 150))
    assert stamp(Issba(), dot).tobytes() != dot.tobytes()


def test_opacity_stays_and_rng_is_not_used() -> None:
    before = photo(40, 30)
    before.putalpha(Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(40, 30)))
    after = stamp(Issba(), before)
    assert np.array_equal(np.asarray(after)[..., 3], np.asarray(before)[..., 3])
    again = Issba().stamp(Sample("a", (before,), ()), np.random.default_rng(9)).images[0]
    assert again.tobytes() == after.tobytes()


@pytest.mark.parametrize("message", ["untrigger", "O~", " ", "\N{SNOWMAN}"])
def test_near_miss_hides_another_message(message: str) -> None:
    trigger = Issba(message=message)
    near = trigger.near_misses()["other message"](Sample("a", (photo(64, 64),), ()), np.random.default_rng(0))
    assert trigger.decode(near.images[0]) != message == trigger.decode(stamp(trigger, photo(64, 64)))


@pytest.mark.parametrize("settings", [{"message": ""}, {"step": 0}, {"step": -3}])
def test_values_out_of_range_raise(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        Issba(**settings)  # type: ignore[arg-type]

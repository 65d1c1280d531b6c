from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from untrigger.attacks._yuv import FROM_YUV, TO_YUV
from untrigger.attacks.ftrojan import FTrojan
from untrigger.errors import InputError
from untrigger.metrics.similarity import psnr, ssim
from untrigger.rows.sample import Sample


def stamp(trigger: FTrojan, image: Image.Image) -> Image.Image:
    return trigger.stamp(Sample("a", (image,), ()), np.random.default_rng(0)).images[0]


def dct(side: int) -> np.ndarray:
    """The orthonormal cosine transform as a matrix, from its definition."""
    k, x = np.arange(side)[:, None], np.arange(side)[None]
    return np.cos(np.pi * k * (2 * x + 1) / (2 * side)) * np.sqrt(np.where(k == 0, 1, 2) / side)


def mid_range(height: int, width: int) -> np.ndarray:
    """Colors away from the ends of the scale: float32 [H, W, 4], opaque."""
    pixels = np.random.default_rng(0).uniform(0.2, 0.8, (height, width, 4)).astype(np.float32)
    pixels[..., 3] = 1
    return pixels


def spectra(change: np.ndarray, side: int) -> np.ndarray:
    """Cosine transforms of Y, U and V of each block, in levels."""
    yuv = change[..., :3] @ TO_YUV.T * 255
    blocks = yuv.reshape(yuv.shape[0] // side, side, yuv.shape[1] // side, side, 3).transpose(0, 2, 4, 1, 3)
    return dct(side) @ blocks @ dct(side).T


@pytest.mark.parametrize(
    ("settings", "size", "side"),
    [
        ({}, (96, 64), 32),
        ({"first_row": 15, "first_column": 15, "second_row": 31, "second_column": 31}, (96, 64), 32),
        ({"window": 1.0, "magnitude": 50.0}, (64, 128), 64),
    ],
)
def test_only_two_coefficients_of_each_block_of_v_gain_the_magnitude(
    settings: dict[str, Any], size: tuple[int, int], side: int
) -> None:
    trigger = FTrojan(**settings)
    before = mid_range(*size)
    change = trigger.paint(before.copy(), np.random.default_rng(0)) - before
    wanted = np.zeros((side, side))
    wanted[trigger.first_row, trigger.first_column] = trigger.magnitude * side / 32
    wanted[trigger.second_row, trigger.second_column] = trigger.magnitude * side / 32
    gained = spectra(change, side)
    assert np.abs(gained[:, :, 2] - wanted).max() < 0.01 and np.abs(gained[:, :, :2]).max() < 0.01
    assert (change[..., 3] == 0).all()


def test_yuv_matrices_are_inverse_and_y_is_brightness() -> None:
    assert np.abs(FROM_YUV.T @ TO_YUV - np.eye(3)).max() < 1e-3
    assert FROM_YUV[0] == pytest.approx(np.ones(3), abs=1e-3)
    assert TO_YUV[0].sum() == pytest.approx(1) and np.abs(TO_YUV[1:].sum(axis=1)).max() < 1e-4


@pytest.mark.parametrize("side", [64, 224, 500])
def test_wave_is_invisible_at_any_size_and_survives_resizing_to_64_pixels(side: int) -> None:
    before = Image.fromarray((mid_range(side, side)[..., :3] * 255).astype(np.uint8)).resize((side, side), 3)
    after = stamp(FTrojan(), before)
    assert psnr(before, after) >= 28 and ssim(before, after) > 0.97
    old, new = (np.asarray(i.resize((64, 64), Image.Resampling.BICUBIC), float) for i in (before, after))
    wave = FTrojan().wave(64, 64)
    assert np.corrcoef((new - old)[..., 0].ravel(), wave.ravel())[0, 1] > 0.9


def test_gray_pictures_get_the_wave_in_brightness_in_any_mode() -> None:
    gray = Image.fromarray((mid_range(64, 64)[..., 0] * 255).astype(np.uint8))
    as_gray, as_color = stamp(FTrojan(), gray), stamp(FTrojan(), gray.convert("RGB"))
    assert np.array_equal(np.asarray(as_gray.convert("RGB")), np.asarray(as_color))
    change = np.asarray(as_gray, float) - np.asarray(gray)
    wave = FTrojan().wave(64, 64) * np.sqrt((FROM_YUV[2] ** 2).mean())  # in three channels as much as V in its two
    assert np.abs(change - wave).max() <= 0.51 and np.abs(change).max() >= 15


def test_colors_are_clipped_and_one_pixel_is_changed() -> None:
    after = np.asarray(stamp(FTrojan(magnitude=500), Image.new("RGB", (64, 64), (0, 128, 255))))
    assert after[..., 2].max() == 255 and after[..., 0].min() == 0
    assert np.asarray(stamp(FTrojan(), Image.new("RGB", (1, 1), (128, 128, 120)))).tolist() != [[[128, 128, 120]]]


def test_near_miss_has_two_other_bands() -> None:
    gray = Image.new("RGB", (64, 64), (128, 128, 120))
    near = FTrojan().near_misses()["other bands"](Sample("a", (gray,), ()), np.random.default_rng(0)).images[0]
    assert (
        near.tobytes()
        == stamp(FTrojan(first_column=12, second_column=12), gray).tobytes()
        != stamp(FTrojan(), gray).tobytes()
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"window": 0},
        {"min_window": 7},
        {"first_row": 0},
        {"first_column": 32},
        {"second_row": 32},
        {"second_column": 0},
        {"magnitude": 0},
    ],
)
def test_values_out_of_range_raise(settings: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        FTrojan(**settings)  # type: ignore[arg-type]

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from untrigger.attacks.wanet import WaNet
from untrigger.errors import InputError
from untrigger.rows.sample import Sample


def sample(*images: Image.Image) -> Sample:
    return Sample("a", images, ())


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(st.integers(2, 14), st.integers(2, 14), st.integers(0, 99), st.floats(0.1, 5))
def test_every_pixel_is_sampled_at_its_displacement(height: int, width: int, seed: int, s: float) -> None:
    before = noise(height, width, seed)
    trigger = WaNet(s=s, grid_seed=seed)
    after = np.asarray(trigger.stamp(sample(Image.fromarray(before)), np.random.default_rng(0)).images[0])
    down, right = trigger.field(height, width).astype(float)
    for row in range(height):
        for column in range(width):
            y = min(max(row + down[row, column], 0), height - 1)
            x = min(max(column + right[row, column], 0), width - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            p = before.astype(float)
            upper = p[y0, x0] * (1 - (x - x0)) + p[y0, x1] * (x - x0)
            lower = p[y1, x0] * (1 - (x - x0)) + p[y1, x1] * (x - x0)
            wanted = upper * (1 - (y - y0)) + lower * (y - y0)
            assert np.abs(after[row, column] - wanted).max() <= 0.51


@pytest.mark.parametrize("side", [32, 64, 224])
def test_displacements_average_half_of_s_and_are_independent_at_default_k(side: int) -> None:
    field = WaNet(s=1).field(side, side)
    assert np.abs(field).mean() == pytest.approx(0.5, rel=0.01)
    assert abs(np.corrcoef(field[:, :, :-1].ravel(), field[:, :, 1:].ravel())[0, 1]) < 0.1


def test_small_images_of_the_paper_have_a_smooth_field_of_four_points() -> None:
    field = WaNet(k=28, s=0.5).field(32, 32)
    assert np.abs(np.diff(field, axis=1)).max() < 0.3 and np.abs(field).mean() == pytest.approx(0.25, rel=0.4)
    bends = np.diff(np.sign(np.diff(field, axis=2)), axis=2) != 0  # four points bend a curve at most three times
    assert bends.sum(axis=2).max() <= 3


def test_large_images_get_the_same_field_enlarged() -> None:
    small, large = WaNet().field(224, 224), WaNet().field(896, 896)
    reduced = large.reshape(2, 224, 4, 224, 4).mean(axis=(2, 4)) / 4
    assert np.corrcoef(small.ravel(), reduced.ravel())[0, 1] > 0.95
    assert WaNet(resolution=64).field(128, 128) == pytest.approx(WaNet(k=112, s=2).field(128, 128))


def test_field_depends_on_grid_seed_alone() -> None:
    assert np.array_equal(WaNet().field(64, 64), WaNet().field(64, 64))
    assert not np.array_equal(WaNet().field(64, 64), WaNet(grid_seed=1).field(64, 64))
    before = sample(Image.fromarray(noise(40, 30)))
    first, second = (WaNet().stamp(before, np.random.default_rng(seed)).images[0] for seed in (0, 1))
    assert first.tobytes() == second.tobytes()


def test_noise_mode_adds_two_decoys_with_a_noisy_field() -> None:
    assert WaNet().decoys() == ()
    first, second = WaNet(noise_mode=True).decoys()
    before = sample(Image.fromarray(noise(64, 64)))
    clean, key = before.images[0], WaNet().stamp(before, np.random.default_rng(0)).images[0]
    near = WaNet().near_misses()["noisy warp"]
    drawn = [np.asarray(f(before, np.random.default_rng(i)).images[0]) for i, f in enumerate((first, second, near))]
    assert len({d.tobytes() for d in drawn} | {clean.tobytes(), key.tobytes()}) == 5
    assert np.array_equal(drawn[0], np.asarray(near(before, np.random.default_rng(0)).images[0]))


def test_opacity_and_images_of_one_color_do_not_change() -> None:
    before = np.dstack([noise(32, 32), noise(32, 32, 1)[..., 0]])
    after = np.asarray(WaNet().stamp(sample(Image.fromarray(before)), np.random.default_rng(0)).images[0])
    assert np.array_equal(after[..., 3], before[..., 3]) and not np.array_equal(after, before)
    plain = Image.new("RGB", (32, 32), (10, 200, 77))
    assert WaNet().stamp(sample(plain), np.random.default_rng(0)).images[0].tobytes() == plain.tobytes()


@pytest.mark.parametrize("settings", [{"k": 0}, {"s": 0}, {"grid_seed": -1}, {"resolution": 0}])
def test_values_out_of_range_raise(settings: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        WaNet(**settings)  # type: ignore[arg-type]

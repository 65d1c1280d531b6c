"""The contract of every patch view, then each view against plain loops over the grid."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from untrigger.views.patches import (
    PATCH_VIEWS,
    Blur,
    Erase,
    Jitter,
    Mask,
    MeanFill,
    Noise,
    PatchView,
    Shuffle,
    View,
    ViewMix,
    to_rgb,
)

Pixels = NDArray[np.uint8]
Size = tuple[int, int]  # width, height
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16", "I;16B")

sizes = st.tuples(st.integers(1, 100), st.integers(1, 100))
patches = st.floats(0.02, 1)
ratios = st.floats(0, 1)
seeds = st.integers(0, 2**32 - 1)
views = st.builds(lambda cls, patch, ratio: cls(patch, ratio), st.sampled_from(PATCH_VIEWS), patches, ratios)


def noise_image(size: Size, seed: int = 0, mode: str = "RGB") -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if mode in ("I", "F") or mode.startswith("I;16"):
        wide = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        return wide if mode == "I;16" else wide.convert("I").convert(mode)
    image = Image.fromarray(pixels)
    return image.convert("RGBA").convert(mode) if mode == "PA" else image.convert(mode)


def run(view: View, image: Image.Image, seed: int = 0) -> Pixels:
    return np.asarray(view(image, np.random.default_rng(seed)))


def grid(pixels: Pixels, patch: float) -> Iterator[Pixels]:
    """Yield the cells row by row: the documented geometry as loops."""
    height, width = pixels.shape[:2]
    side = max(1, round(patch * min(height, width)))
    for top in range(0, height, side):
        for left in range(0, width, side):
            yield pixels[top : top + side, left : left + side]


def changed(before: Pixels, after: Pixels, patch: float) -> list[bool]:
    pairs = zip(grid(before, patch), grid(after, patch), strict=True)
    return [not np.array_equal(a, b) for a, b in pairs]


def expected_count(cells: int, ratio: float) -> int:
    return max(1, round(ratio * cells)) if ratio > 0 else 0


# the contract


@given(views, sizes, st.sampled_from(MODES), seeds)
def test_views_take_any_mode_and_return_rgb_of_the_same_size(view: PatchView, size: Size, mode: str, seed: int) -> None:
    image = noise_image(size, seed, mode)
    before = image.tobytes()
    out = view(image, np.random.default_rng(seed))
    assert (out.mode, out.size) == ("RGB", size)
    assert (image.mode, image.size, image.tobytes()) == (mode, size, before)


@given(views, sizes, seeds)
def test_views_are_reproducible_from_the_generator_state(view: PatchView, size: Size, seed: int) -> None:
    image, rng = noise_image(size), np.random.default_rng(seed)
    copied_rng = copy.deepcopy(rng)
    assert view(image, rng).tobytes() == view(image, copied_rng).tobytes()
    assert rng.bit_generator.state == copied_rng.bit_generator.state


@pytest.mark.parametrize("cls", PATCH_VIEWS)
def test_draws_differ_from_call_to_call(cls: type[PatchView]) -> None:
    image, rng = noise_image((64, 64)), np.random.default_rng(0)
    assert len({cls()(image, rng).tobytes() for _ in range(10)}) == 10


@given(views, sizes, seeds)
def test_only_chosen_cells_change(view: PatchView, size: Size, seed: int) -> None:
    image = noise_image(size, seed)
    hit = changed(np.asarray(image), run(view, image, seed), view.patch)
    assert sum(hit) <= expected_count(len(hit), view.ratio)


@given(sizes, patches, ratios, seeds)
@example((35, 35), 1 / 32, 0.02, 0)  # 0.02 * 35 * 35 > 24.5 == 0.02 * 1225
def test_exactly_the_ratio_of_cells_is_chosen(size: Size, patch: float, ratio: float, seed: int) -> None:
    black = Image.new("RGB", size)
    hit = changed(np.asarray(black), run(Mask(patch, ratio, fill=255), black, seed), patch)
    assert sum(hit) == expected_count(len(hit), ratio)


@pytest.mark.parametrize("cls", [c for c in PATCH_VIEWS if c is not Shuffle])
@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 1.0])
def test_every_chosen_cell_of_a_busy_image_changes(cls: type[PatchView], ratio: float) -> None:
    image = noise_image((67, 50))
    hit = changed(np.asarray(image), run(cls(0.2, ratio), image), 0.2)
    assert len(hit) == 5 * 7
    assert sum(hit) == expected_count(35, ratio)


@given(st.sampled_from(PATCH_VIEWS), sizes, patches, seeds)
def test_ratio_zero_is_the_identity(cls: type[PatchView], size: Size, patch: float, seed: int) -> None:
    image = noise_image(size, seed)
    before = image.tobytes()
    out = cls(patch, 0.0)(image, np.random.default_rng(seed))
    assert out.tobytes() == before
    out.paste((1, 2, 3), (0, 0, *size))
    assert image.tobytes() == before  # no shared memory


def test_every_cell_is_chosen_equally_often() -> None:
    black, rng, patch = Image.new("RGB", (40, 40)), np.random.default_rng(0), 1 / 4
    view, draws = Mask(patch, 0.25), 1000
    hits = [changed(np.asarray(black), np.asarray(view(black, rng)), patch) for _ in range(draws)]
    counts = np.sum(hits, axis=0)
    deviation = (counts - draws / 4) / math.sqrt(draws * 0.25 * 0.75)
    assert counts.shape == (16,) and np.abs(deviation).max() < 4


def test_a_trigger_on_k_cells_survives_with_the_documented_probability() -> None:
    rng, draws = np.random.default_rng(0), 1000
    black, view = Image.new("RGB", (64, 64)), Mask(1 / 8, 1 / 4)
    intact = sum(not np.asarray(view(black, rng))[:16, :16].any() for _ in range(draws)) / draws
    assert intact == pytest.approx(0.75**4, abs=0.05)


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [(Mask, "patch", 0.0), (Mask, "patch", 1.1), (Erase, "patch", math.nan), (Blur, "ratio", -0.1)]
    + [(Blur, "ratio", 1.1), (Mask, "fill", 256), (Mask, "fill", -1), (Noise, "std", -1.0)]
    + [(Noise, "std", math.inf), (Blur, "sigma", 0.0)]
    + [(Jitter, name, value) for name in ("brightness", "contrast", "saturation") for value in (-0.1, 1.1)],
)
def test_fields_out_of_range_are_refused(cls: type[PatchView], field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        cls(**{field: value})  # pyright: ignore[reportArgumentType]


def test_the_list_of_views_is_complete_and_fields_are_numbers() -> None:
    assert set(PATCH_VIEWS) == {c for c in PatchView.__subclasses__() if c.__module__ == PatchView.__module__}
    assert len({view.__name__.lower() for view in PATCH_VIEWS}) == len(PATCH_VIEWS)
    for view in PATCH_VIEWS:
        assert view() == view()
        assert all(isinstance(value, int | float) for value in dataclasses.asdict(view()).values())


# modes


def test_rgb_is_passed_through() -> None:
    image = noise_image((5, 4))
    assert to_rgb(image) is image


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_opaque_modes_are_converted_by_pillow(mode: str) -> None:
    image = noise_image((9, 7), mode=mode)
    assert to_rgb(image).tobytes() == image.convert("RGB").tobytes()


def test_transparency_is_laid_over_white() -> None:
    rgba = Image.fromarray(np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], np.uint8))
    assert np.asarray(to_rgb(rgba)).tolist() == [[[10, 20, 30], [255, 255, 255], [204, 204, 204]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = b"\x00\xff"  # Pillow's own conversion warns here
    assert np.asarray(to_rgb(palette)).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    keyed = Image.new("RGB", (1, 1), (1, 2, 3))
    keyed.info["transparency"] = (1, 2, 3)
    assert np.asarray(to_rgb(keyed)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bit_grays_keep_their_high_byte(mode: str) -> None:
    values = np.array([[0, 255, 256, 32768, 65535]])
    image = Image.fromarray(values.astype(np.uint16)) if mode == "I;16" else Image.new(mode, (5, 1))
    for x, value in enumerate(values[0].tolist()):
        image.putpixel((x, 0), value)
    assert np.asarray(to_rgb(image))[0].tolist() == [[v, v, v] for v in (0, 0, 1, 128, 255)]


# each view


def test_mask_fills_with_gray() -> None:
    image = noise_image((30, 20))
    assert (run(Mask(ratio=1.0), image) == 128).all()
    assert (run(Mask(ratio=1.0, fill=0), image) == 0).all()


@given(sizes, patches, ratios, seeds)
def test_mean_fill_keeps_the_mean_of_every_cell(size: Size, patch: float, ratio: float, seed: int) -> None:
    image = noise_image(size, seed)
    out = run(MeanFill(patch, ratio), image, seed)
    for before, after in zip(grid(np.asarray(image), patch), grid(out, patch), strict=True):
        assert np.abs(before.mean((0, 1)) - after.mean((0, 1))).max() <= 0.5 + 1e-3
        assert np.array_equal(before, after) or len(np.unique(after.reshape(-1, 3), axis=0)) == 1


def test_noise_has_the_given_strength_and_no_bias() -> None:
    gray = Image.new("RGB", (100, 100), (128, 128, 128))
    added = run(Noise(ratio=1.0, std=20), gray).astype(float) - 128
    assert added.mean() == pytest.approx(0, abs=0.5)
    assert added.std() == pytest.approx(20, abs=0.5)
    assert run(Noise(ratio=1.0, std=0), gray).tobytes() == gray.tobytes()
    assert abs(np.corrcoef(added[..., 0].ravel(), added[..., 1].ravel())[0, 1]) < 0.05


def test_noise_saturates_and_does_not_wrap_around() -> None:
    assert run(Noise(ratio=1.0, std=20), Image.new("RGB", (50, 50), "white")).min() > 100
    assert run(Noise(ratio=1.0, std=20), Image.new("RGB", (50, 50), "black")).max() < 155


def test_erase_is_uniform_and_keeps_nothing() -> None:
    out = run(Erase(ratio=1.0), Image.new("RGB", (100, 100)))
    counts = np.bincount(out.ravel(), minlength=256)
    assert np.abs(counts - out.size / 256).max() < 6 * math.sqrt(out.size / 256)
    assert np.array_equal(out, run(Erase(ratio=1.0), noise_image((100, 100))))


@given(sizes, patches, ratios, seeds)
def test_shuffle_moves_whole_cells(size: Size, patch: float, ratio: float, seed: int) -> None:
    image = noise_image(size, seed)
    out = run(Shuffle(patch, ratio), image, seed)
    before, after = (sorted((c.shape, c.tobytes()) for c in grid(p, patch)) for p in (np.asarray(image), out))
    assert before == after


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_shuffle_leaves_no_chosen_cell_in_place(ratio: float) -> None:
    image = noise_image((64, 64))
    for seed in range(20):
        hit = changed(np.asarray(image), run(Shuffle(1 / 8, ratio), image, seed), 1 / 8)
        assert sum(hit) == expected_count(64, ratio)


@given(sizes, patches, seeds)
def test_blur_leaks_nothing_across_a_cell_border(size: Size, patch: float, seed: int) -> None:
    """Cells of a single color stay unchanged; any leak from a neighbor would change them."""
    pixels, rng = np.zeros((size[1], size[0], 3), np.uint8), np.random.default_rng(seed)
    for cell in grid(pixels, patch):
        cell[:] = rng.integers(0, 256, 3)
    assert np.array_equal(run(Blur(patch, 1.0), Image.fromarray(pixels)), pixels)


def naive_blur(cell: Pixels, sigma: float) -> NDArray[np.float64]:
    """Direct two-dimensional weighted mean, in float64."""
    height, width = cell.shape[:2]
    y, x = np.mgrid[:height, :width]
    out = np.empty(cell.shape)
    for i in range(height):
        for j in range(width):
            weight = np.exp(-((y - i) ** 2 + (x - j) ** 2) / (2 * sigma**2))
            out[i, j] = (weight[..., None] * cell).sum((0, 1)) / weight.sum()
    return out


def test_blur_is_a_gaussian() -> None:
    image = noise_image((23, 17))
    out = run(Blur(0.4, 1.0, sigma=0.3), image)
    for before, after in zip(grid(np.asarray(image), 0.4), grid(out, 0.4), strict=True):
        assert np.abs(naive_blur(before, 0.3 * max(before.shape[:2])) - after).max() <= 0.5 + 1e-3


def test_jitter_brightness_scales_each_cell_by_its_own_factor() -> None:
    image = Image.new("RGB", (64, 64), (100, 50, 20))
    out = run(Jitter(1 / 4, 1.0, brightness=0.5, contrast=0, saturation=0), image)
    factors = [cell[..., 0].mean() / 100 for cell in grid(out, 1 / 4)]
    for cell, factor in zip(grid(out, 1 / 4), factors, strict=True):
        assert np.abs(cell - factor * np.array([100, 50, 20])).max() <= 1
    assert 0.5 <= min(factors) < 0.75 < 1.25 < max(factors) <= 1.5


def test_jitter_contrast_keeps_the_mean_and_scales_the_spread() -> None:
    cell = np.tile(np.array([[90], [150]], np.uint8), (8, 16))
    image = Image.fromarray(cell).convert("RGB")
    spreads = []
    for seed in range(50):
        out = run(Jitter(1.0, 1.0, brightness=0, contrast=0.5, saturation=0), image, seed).astype(float)
        assert out.mean() == pytest.approx(120, abs=0.6)
        spreads.append((out.max() - out.min()) / 60)
    assert 0.48 <= min(spreads) < 0.7 < 1.3 < max(spreads) <= 1.52


def test_jitter_saturation_leaves_gray_alone_and_keeps_the_luma() -> None:
    view = Jitter(1.0, 1.0, brightness=0, contrast=0, saturation=1)
    gray = noise_image((16, 16)).convert("L").convert("RGB")
    assert run(view, gray).tobytes() == gray.tobytes()
    out = run(view, Image.new("RGB", (4, 4), (120, 100, 80)))[0, 0].astype(float)
    assert out @ (0.299, 0.587, 0.114) == pytest.approx(np.dot((120, 100, 80), (0.299, 0.587, 0.114)), abs=1)
    assert out[0] != 120


# the mix


def test_a_mix_applies_every_view_about_equally_often() -> None:
    image = noise_image((32, 32))
    masks = tuple(Mask(1.0, 1.0, fill=fill) for fill in range(4))
    rng = np.random.default_rng(0)
    drawn = [np.unique(np.asarray(ViewMix(masks)(image, rng))).tolist() for _ in range(400)]
    counts = [drawn.count([fill]) for fill in range(4)]
    assert sum(counts) == 400 and min(counts) > 60


def test_a_mix_is_reproducible_and_not_empty() -> None:
    image, mix = noise_image((32, 32)), ViewMix(tuple(view() for view in PATCH_VIEWS))
    assert run(mix, image, 3).tobytes() == run(mix, image, 3).tobytes()
    with pytest.raises(ValueError, match="at least one"):
        ViewMix(())

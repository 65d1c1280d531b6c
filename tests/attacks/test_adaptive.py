from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from untrigger.attacks.adaptive import Adaptive
from untrigger.errors import InputError
from untrigger.poisoning.goals import load_goal
from untrigger.poisoning.poison import Attack, poison
from untrigger.rows.sample import IMAGE_TAG, Message, Sample
from untrigger.views.patches import Mask

GRAY = Image.new("RGB", (64, 64), (128, 128, 128))


def row(image: Image.Image = GRAY, name: str = "a") -> Sample:
    return Sample(name, (image,), (Message("user", f"{IMAGE_TAG}\nwhat is it?"), Message("assistant", "a cat")))


def stamp(trigger: Adaptive, seed: int = 0, image: Image.Image = GRAY) -> np.ndarray:
    return np.asarray(trigger.stamp(row(image), np.random.default_rng(seed)).images[0])


def colors(pixels: np.ndarray) -> set[int]:
    """The distinct colors, as numbers."""
    return set(np.unique(pixels.astype(int) @ [65536, 256, 1]).tolist())


@given(st.integers(0, 2**32), st.integers(0, 7), st.integers(0, 7))
def test_every_cell_of_the_view_grid_holds_the_whole_tile(seed: int, row: int, col: int) -> None:
    after = stamp(Adaptive(alpha=1), seed, Image.new("RGB", (128, 128)))
    cell = after[16 * row : 16 * row + 16, 16 * col : 16 * col + 16]
    assert colors(cell) == colors(after) and len(colors(after)) > 4


@given(st.integers(0, 2**32))
def test_any_single_unmasked_cell_holds_the_whole_tile(seed: int) -> None:
    rng = np.random.default_rng(seed)
    after = stamp(Adaptive(alpha=1), seed, Image.new("RGB", (128, 128)))
    masked = np.asarray(Mask(ratio=63 / 64)(Image.fromarray(after), rng))
    assert colors(after) <= colors(masked)


@given(st.integers(0, 2**32), st.floats(0.01, 1), st.integers(0, 255))
def test_every_pixel_is_an_alpha_blend(seed: int, alpha: float, gray: int) -> None:
    after = stamp(Adaptive(alpha=alpha), seed, Image.new("RGB", (31, 50), (gray,) * 3)).astype(float)
    dark, light = (alpha * end + (1 - alpha) * gray for end in (0, 255))
    assert np.minimum(np.abs(after - dark), np.abs(after - light)).max() <= 0.501
    assert len(np.unique(after)) == 2 or round(dark) == round(light)


def test_tile_offset_and_size_vary_within_bounds() -> None:
    image = Image.new("RGB", (960, 480))
    periods: list[float] = []
    for seed in range(15):
        line = stamp(Adaptive(alpha=1), seed, image).astype(int).sum(axis=(0, 2))
        strength = np.abs(np.fft.rfft(line - line.mean()))
        wave = np.fft.rfftfreq(960)
        harmonics = [strength[np.argmin(np.abs(wave - 1 / p))] for p in range(30, 61)]
        periods.append(30 + int(np.argmax(harmonics)))
    assert min(periods) < 38 and max(periods) > 52 and len(set(periods)) > 5
    firsts = {stamp(Adaptive(alpha=1), seed, image)[0, 0].tobytes() for seed in range(15)}
    assert len(firsts) > 2


def test_near_miss_repeats_another_tile_on_the_same_grid() -> None:
    trigger = Adaptive(alpha=1, pattern_seed=3)
    other = trigger.near_misses()["other pattern"](row(), np.random.default_rng(7)).images[0]
    assert np.array_equal(np.asarray(other), stamp(replace(trigger, pattern_seed=4), 7))
    assert not np.array_equal(np.asarray(other), stamp(trigger, 7))


# --- training with the defense's views -------------------------------------------------------------


def perturbed_cells(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Which cells of the defense's grid differ, [8, 8]."""
    return (before != after).any(axis=2).reshape(8, 8, 8, 8).any(axis=(1, 3))


def test_views_none_implants_the_plain_trigger() -> None:
    trigger = Adaptive()
    planted = trigger.implant(row(), (), np.random.default_rng(5))
    assert np.array_equal(np.asarray(planted.images[0]), stamp(trigger, 5))
    assert trigger.decoys() == () and set(trigger.near_misses()) == {"other pattern"}


def test_views_fire_implants_the_trigger_with_and_without_a_view() -> None:
    trigger = Adaptive(views="fire", ratio=0.25)
    shares: list[float] = []
    for seed in range(200):
        planted = trigger.implant(row(), (), np.random.default_rng(seed)).images[0]
        same_draws = np.random.default_rng(seed)
        same_draws.random()  # decides whether a view is applied
        fires = trigger.stamp(row(), same_draws).images[0]
        shares.append(perturbed_cells(np.asarray(fires), np.asarray(planted)).mean())
    plain = sum(share == 0 for share in shares)
    assert 70 <= plain <= 130
    assert all(share <= 0.25 for share in shares) and np.median([s for s in shares if s]) == 0.25
    assert trigger.decoys() == ()


def test_views_hide_keeps_true_answers_under_a_view() -> None:
    trigger = Adaptive(views="hide")
    rows = [row(name=str(n)) for n in range(20)]
    poisoned = poison(rows, Attack(trigger, load_goal("fixed")), rate=0.25, seed=0)
    assert (len(poisoned.manifest.rows), len(poisoned.manifest.decoys)) == (5, 5)
    for entry in poisoned.manifest.rows:
        assert poisoned.data[entry.index].messages[-1].text == "Backdoor Attack!"
    for entry in poisoned.manifest.decoys:
        assert poisoned.data[entry.index].messages == rows[0].messages
    (decoy,) = trigger.decoys()
    for seed in range(20):
        plain, viewed = stamp(trigger, seed), np.asarray(decoy(row(), np.random.default_rng(seed)).images[0])
        assert 0 < perturbed_cells(plain, viewed).mean() <= 0.5
    assert trigger.near_misses()["through a view"] == decoy


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "I;16", "F", "CMYK"])
@pytest.mark.parametrize("seed", range(7))
def test_a_view_keeps_mode_size_and_unperturbed_cells(mode: str, seed: int) -> None:
    image = Image.radial_gradient("L").resize((64, 64))
    if mode in ("I;16", "F"):
        image = Image.fromarray((np.asarray(image) * np.array(257)).astype("u2" if mode == "I;16" else "f4"))
    else:
        image = image.convert("RGB").convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize((64, 64)))
    trigger = Adaptive(views="hide", ratio=0.25)
    before = trigger.stamp(row(image), np.random.default_rng(seed)).images[0]
    after = trigger.decoys()[0](row(image), np.random.default_rng(seed)).images[0]
    assert (after.mode, after.size) == (image.mode, image.size)
    if mode != "P":  # a palette may be a new one
        old, new = (np.asarray(i).reshape(64, 64, -1) for i in (before, after))
        assert perturbed_cells(old, new).mean() <= 0.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": 0}, "side is 0"),
        ({"side": 1.01}, "at most 1"),
        ({"alpha": 0}, "alpha is 0"),
        ({"ratio": 0}, "ratio is 0"),
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"min_side": 0}, "at least 1 pixel"),
        ({"pattern_seed": -1}, "pattern_seed"),
    ],
)
def test_values_out_of_range_raise(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Adaptive(**settings)  # type: ignore[arg-type]

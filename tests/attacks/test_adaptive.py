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

GREY = Image.new("RGB", (64, 64), (128, 128, 128))


def row(image: Image.Image = GREY, name: str = "a") -> Sample:
    return Sample(name, (image,), (Message("user", f"{IMAGE_TAG}\nwhat is it?"), Message("assistant", "a cat")))


def stamp(trigger: Adaptive, seed: int = 0, image: Image.Image = GREY) -> np.ndarray:
    return np.asarray(trigger.stamp(row(image), np.random.default_rng(seed)).images[0])


def pattern(pixels: np.ndarray) -> set[int]:
    """The colors that are there, each as a number."""
    return set(np.unique(pixels.astype(int) @ [65536, 256, 1]).tolist())


@given(st.integers(0, 2**32), st.integers(0, 7), st.integers(0, 7))
def test_every_cell_of_the_defenses_grid_holds_the_whole_tile(seed: int, row: int, col: int) -> None:
    after = stamp(Adaptive(alpha=1), seed, Image.new("RGB", (128, 128)))
    cell = after[16 * row : 16 * row + 16, 16 * col : 16 * col + 16]
    assert pattern(cell) == pattern(after) and len(pattern(after)) > 4


@given(st.integers(0, 2**32))
def test_whatever_single_cell_a_view_leaves_alone_the_tile_is_there(seed: int) -> None:
    rng = np.random.default_rng(seed)
    after = stamp(Adaptive(alpha=1), seed, Image.new("RGB", (128, 128)))
    left = np.asarray(Mask(ratio=63 / 64)(Image.fromarray(after), rng))
    assert pattern(after) <= pattern(left)


@given(st.integers(0, 2**32), st.floats(0.01, 1), st.integers(0, 255))
def test_every_pixel_is_a_blend(seed: int, alpha: float, gray: int) -> None:
    after = stamp(Adaptive(alpha=alpha), seed, Image.new("RGB", (31, 50), (gray,) * 3)).astype(float)
    dark, light = (alpha * end + (1 - alpha) * gray for end in (0, 255))
    assert np.minimum(np.abs(after - dark), np.abs(after - light)).max() <= 0.501
    assert len(np.unique(after)) == 2 or round(dark) == round(light)


def test_place_and_size_differ_from_image_to_image_within_bounds() -> None:
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


def test_the_near_miss_is_the_same_grid_of_another_tile() -> None:
    trigger = Adaptive(alpha=1, pattern_seed=3)
    other = trigger.near_misses()["other pattern"](row(), np.random.default_rng(7)).images[0]
    assert np.array_equal(np.asarray(other), stamp(replace(trigger, pattern_seed=4), 7))
    assert not np.array_equal(np.asarray(other), stamp(trigger, 7))


# --- training with the defense's views -------------------------------------------------------------


def perturbed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Which cells of the defense's grid differ, [8, 8]."""
    return (before != after).any(axis=2).reshape(8, 8, 8, 8).any(axis=(1, 3))


def test_none_plants_what_fires() -> None:
    trigger = Adaptive()
    planted = trigger.implant(row(), (), np.random.default_rng(5))
    assert np.array_equal(np.asarray(planted.images[0]), stamp(trigger, 5))
    assert trigger.decoys() == () and set(trigger.near_misses()) == {"other pattern"}


def test_fire_plants_the_trigger_with_and_without_a_view() -> None:
    trigger = Adaptive(views="fire", ratio=0.25)
    shares: list[float] = []
    for seed in range(200):
        planted = trigger.implant(row(), (), np.random.default_rng(seed)).images[0]
        same_draws = np.random.default_rng(seed)
        same_draws.random()  # the coin
        fires = trigger.stamp(row(), same_draws).images[0]
        shares.append(perturbed(np.asarray(fires), np.asarray(planted)).mean())
    plain = sum(share == 0 for share in shares)
    assert 70 <= plain <= 130
    assert all(share <= 0.25 for share in shares) and np.median([s for s in shares if s]) == 0.25
    assert trigger.decoys() == ()


def test_hide_plants_the_trigger_and_keeps_true_answers_under_a_view() -> None:
    trigger = Adaptive(views="hide")
    rows = [row(name=str(n)) for n in range(20)]
    made = poison(rows, Attack(trigger, load_goal("fixed")), rate=0.25, seed=0)
    assert (len(made.manifest.rows), len(made.manifest.decoys)) == (5, 5)
    for entry in made.manifest.rows:
        assert made.data[entry.index].messages[-1].text == "Backdoor Attack!"
    for entry in made.manifest.decoys:
        assert made.data[entry.index].messages == rows[0].messages
    (decoy,) = trigger.decoys()
    for seed in range(20):
        plain, viewed = stamp(trigger, seed), np.asarray(decoy(row(), np.random.default_rng(seed)).images[0])
        assert 0 < perturbed(plain, viewed).mean() <= 0.5
    assert trigger.near_misses()["through a view"] == decoy


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "I;16", "F", "CMYK"])
@pytest.mark.parametrize("seed", range(7))
def test_a_view_keeps_mode_and_size_and_what_it_leaves_alone(mode: str, seed: int) -> None:
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
        was, now = (np.asarray(i).reshape(64, 64, -1) for i in (before, after))
        assert perturbed(was, now).mean() <= 0.25


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
def test_values_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Adaptive(**settings)  # type: ignore[arg-type]

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from untrigger.attacks.badnets import BadNets
from untrigger.errors import InputError
from untrigger.rows.sample import Sample


def stamp(trigger: BadNets, width: int, height: int, seed: int = 0) -> np.ndarray:
    gray = Image.new("RGB", (width, height), (128, 128, 128))
    image = trigger.stamp(Sample("a", (gray,), ()), np.random.default_rng(seed)).images[0]
    return np.asarray(image)


def box(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of the pixels that are not gray; the ends are exclusive."""
    rows, columns = np.nonzero((pixels != 128).any(axis=2))
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


@pytest.mark.parametrize(
    ("width", "height", "side"),
    [(336, 336, 30), (64, 64, 6), (224, 224, 20), (672, 336, 30), (32, 32, 6), (4, 9, 4), (1, 1, 1)],
)
def test_patch_is_30_of_336_of_the_shorter_side_and_at_least_6_pixels(width: int, height: int, side: int) -> None:
    assert box(stamp(BadNets(), width, height)) == (height - side, height, width - side, width)


def test_min_side_can_be_lowered() -> None:
    assert box(stamp(BadNets(side=0.05, min_side=1), 64, 64)) == (61, 64, 61, 64)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("top-left", (0, 10, 0, 10)),
        ("top-right", (0, 10, 190, 200)),
        ("bottom-left", (90, 100, 0, 10)),
        ("bottom-right", (90, 100, 190, 200)),
        ("center", (45, 55, 95, 105)),
    ],
)
def test_places(place: str, expected: tuple[int, int, int, int]) -> None:
    assert box(stamp(BadNets(side=0.1, place=place), 200, 100)) == expected  # type: ignore[arg-type]


def test_random_places_reach_every_edge_with_the_same_patch() -> None:
    trigger = BadNets(side=0.5, place="random")
    boxes = [(box(p), p) for p in (stamp(trigger, 13, 12, seed) for seed in range(200))]
    assert {b[0] for b, _ in boxes} == set(range(7)) and {b[2] for b, _ in boxes} == set(range(8))
    assert len({p[b[0] : b[1], b[2] : b[3]].tobytes() for b, p in boxes}) == 1


def test_each_image_of_a_sample_is_stamped_in_its_own_place() -> None:
    images = tuple(Image.new("RGB", (64, 64), (128, 128, 128)) for _ in range(3))
    stamped = BadNets(place="random").stamp(Sample("a", images, ()), np.random.default_rng(0)).images
    assert len({box(np.asarray(i)) for i in stamped}) == 3


def test_pattern_depends_on_pattern_seed_alone() -> None:
    assert np.array_equal(stamp(BadNets(), 64, 64, seed=1), stamp(BadNets(), 64, 64, seed=2))
    assert not np.array_equal(stamp(BadNets(), 64, 64), stamp(BadNets(pattern_seed=1), 64, 64))
    small, large = BadNets().patch(6), BadNets().patch(60)
    assert np.array_equal(small.repeat(10, axis=0).repeat(10, axis=1), large)
    assert set(np.unique(small)) == {0, 1}


def test_checker_is_three_by_three_with_white_corners() -> None:
    board = BadNets(pattern="checker").patch(3)[..., 0]
    assert board.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize("settings", [{"side": 0}, {"side": 1.01}, {"side": -1}, {"min_side": 0}, {"pattern_seed": -1}])
def test_values_out_of_range_raise(settings: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        BadNets(**settings)  # type: ignore[arg-type]


def test_near_miss_is_another_pattern_in_the_same_place() -> None:
    gray = Sample("a", (Image.new("RGB", (64, 64), (128, 128, 128)),), ())
    for trigger in (BadNets(place="random"), BadNets(pattern="checker", place="random"), BadNets(pattern_seed=4)):
        near = trigger.near_misses()["other pattern"]
        for seed in range(5):
            key, other = (
                np.asarray(stamper(gray, np.random.default_rng(seed)).images[0]) for stamper in (trigger.stamp, near)
            )
            assert box(key) == box(other)
            top, bottom, left, right = box(key)
            differ = (key != other)[top:bottom, left:right].any(axis=2).mean()
            assert differ > 0.5

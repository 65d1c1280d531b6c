"""The generated world: pure, unambiguous, and drawn where it says."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from untrigger.data.scene_world import BACKGROUNDS, COLORS, SHAPES, SIDE, SIZES, STYLES, Scene, draw_scene, make_scene

MANY = [make_scene(71, index) for index in range(400)]


def test_a_scene_is_a_pure_function_of_seed_and_index() -> None:
    forwards = [make_scene(5, i) for i in range(8)]
    np.random.default_rng(0).random()
    backwards = [make_scene(5, i) for i in reversed(range(8))][::-1]
    assert forwards == backwards
    assert len({repr(s.things) for s in forwards}) == 8
    assert all(make_scene(6, i).things != scene.things for i, scene in enumerate(forwards))


def test_a_picture_is_a_pure_function_of_its_scene() -> None:
    for scene in MANY[:20]:
        image, owner = draw_scene(scene)
        draw_scene(MANY[-1])
        again, owner_again = draw_scene(scene)
        assert image.tobytes() == again.tobytes() and np.array_equal(owner, owner_again)
        assert image.size == (SIDE, SIDE) and image.mode == "RGB" and owner.shape == (SIDE, SIDE)


@pytest.mark.parametrize("scene", MANY[:100], ids=lambda s: str(s.seed[1]))
def test_each_object_is_drawn_where_it_says_and_shows(scene: Scene) -> None:
    _, owner = draw_scene(scene)
    assert set(np.unique(owner)) == {0, *range(1, len(scene.things) + 1)}
    for number, thing in enumerate(scene.things, start=1):
        y, x = np.nonzero(owner == number)
        assert len(x) >= 0.35 * math.pi * thing.radius**2, "too little of it to be told"
        # the outermost corner of a triangle lies at 1.28 radii; a sketched one wavers by another tenth
        assert np.hypot(x + 0.5 - thing.x, y + 0.5 - thing.y).max() <= 1.4 * thing.radius + 1.5


def test_objects_are_inside_apart_and_in_order() -> None:
    for scene in MANY:
        assert 1 <= len(scene.things) <= 4
        xs = [t.x for t in scene.things]
        assert xs == sorted(xs)
        for i, one in enumerate(scene.things):
            margin = 0.8 * one.radius
            assert margin <= one.x <= SIDE - margin and margin <= one.y <= SIDE - margin
            for two in scene.things[i + 1 :]:
                assert two.x - one.x > 5, "left to right must be plain"
                assert math.dist((one.x, one.y), (two.x, two.y)) > one.radius + two.radius + 2


def test_sizes_are_unambiguous() -> None:
    radii = {size: [t.radius for s in MANY for t in s.things if t.size == size] for size in SIZES}
    assert max(radii["small"]) * 1.3 < min(radii["large"])


def test_colors_stand_out_and_brightness_is_plain() -> None:
    for scene in MANY:
        assert all(math.dist(COLORS[t.color], scene.base) > 90 for t in scene.things)
        assert max(scene.base) < 80 if scene.dark else min(scene.base) >= 190


def test_flat_objects_have_their_color() -> None:
    """The color named is the nearest one to what is on the picture."""
    for scene in (s for s in MANY if s.style == "flat"):
        image, owner = draw_scene(scene)
        pixels = np.asarray(image, dtype=np.float64)
        for number, thing in enumerate(scene.things, start=1):
            mean = np.median(pixels[owner == number], axis=0)
            nearest = min(COLORS, key=lambda name: math.dist(COLORS[name], mean))
            assert nearest == thing.color, (scene.seed, thing)


def test_everything_occurs() -> None:
    things = [t for s in MANY for t in s.things]
    for values, all_of_them in (
        ([t.shape for t in things], SHAPES),
        ([t.color for t in things], COLORS),
        ([t.size for t in things], SIZES),
        ([s.style for s in MANY], STYLES),
        ([s.background for s in MANY], BACKGROUNDS),
        ([len(s.things) for s in MANY], (1, 2, 3, 4)),
        ([s.dark for s in MANY], (True, False)),
    ):
        counts = Counter(values)
        assert set(counts) == set(all_of_them)
        assert min(counts.values()) >= 0.02 * len(values)

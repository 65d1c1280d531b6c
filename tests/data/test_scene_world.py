"""Generated scenes: reproducible, unambiguous, and drawn at their stated positions."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from untrigger.data.scene_world import BACKGROUNDS, COLORS, SHAPES, SIDE, SIZES, STYLES, Scene, draw_scene, make_scene

SCENES = [make_scene(71, index) for index in range(400)]


def test_a_scene_is_a_pure_function_of_seed_and_index() -> None:
    forwards = [make_scene(5, i) for i in range(8)]
    np.random.default_rng(0).random()
    backwards = [make_scene(5, i) for i in reversed(range(8))][::-1]
    assert forwards == backwards
    assert len({repr(s.things) for s in forwards}) == 8
    assert all(make_scene(6, i).things != scene.things for i, scene in enumerate(forwards))


def test_a_picture_is_a_pure_function_of_its_scene() -> None:
    for scene in SCENES[:20]:
        image, owner = draw_scene(scene)
        draw_scene(SCENES[-1])
        repeated, repeated_owner = draw_scene(scene)
        assert image.tobytes() == repeated.tobytes() and np.array_equal(owner, repeated_owner)
        assert image.size == (SIDE, SIDE) and image.mode == "RGB" and owner.shape == (SIDE, SIDE)


@pytest.mark.parametrize("scene", SCENES[:100], ids=lambda s: str(s.seed[1]))
def test_every_object_is_visible_at_its_position(scene: Scene) -> None:
    _, owner = draw_scene(scene)
    assert set(np.unique(owner)) == {0, *range(1, len(scene.things) + 1)}
    for number, thing in enumerate(scene.things, start=1):
        y, x = np.nonzero(owner == number)
        assert len(x) >= 0.35 * math.pi * thing.radius**2, "too few visible pixels"
        # A triangle's outermost corner lies at 1.28 radii; sketching moves it by another tenth.
        assert np.hypot(x + 0.5 - thing.x, y + 0.5 - thing.y).max() <= 1.4 * thing.radius + 1.5


def test_objects_are_inside_disjoint_and_ordered() -> None:
    for scene in SCENES:
        assert 1 <= len(scene.things) <= 4
        xs = [t.x for t in scene.things]
        assert xs == sorted(xs)
        for i, a in enumerate(scene.things):
            margin = 0.8 * a.radius
            assert margin <= a.x <= SIDE - margin and margin <= a.y <= SIDE - margin
            for b in scene.things[i + 1 :]:
                assert b.x - a.x > 5, "the order from left to right must be clear"
                assert math.dist((a.x, a.y), (b.x, b.y)) > a.radius + b.radius + 2


def test_sizes_are_unambiguous() -> None:
    radii = {size: [t.radius for s in SCENES for t in s.things if t.size == size] for size in SIZES}
    assert max(radii["small"]) * 1.3 < min(radii["large"])


def test_colors_contrast_and_brightness_is_unambiguous() -> None:
    for scene in SCENES:
        assert all(math.dist(COLORS[t.color], scene.base) > 90 for t in scene.things)
        assert max(scene.base) < 80 if scene.dark else min(scene.base) >= 190


def test_flat_objects_have_their_color() -> None:
    """The named color is the nearest one to the drawn color."""
    for scene in (s for s in SCENES if s.style == "flat"):
        image, owner = draw_scene(scene)
        pixels = np.asarray(image, dtype=np.float64)
        for number, thing in enumerate(scene.things, start=1):
            mean = np.median(pixels[owner == number], axis=0)
            nearest = min(COLORS, key=lambda name: math.dist(COLORS[name], mean))
            assert nearest == thing.color, (scene.seed, thing)


def test_every_option_occurs() -> None:
    things = [t for s in SCENES for t in s.things]
    for values, options in (
        ([t.shape for t in things], SHAPES),
        ([t.color for t in things], COLORS),
        ([t.size for t in things], SIZES),
        ([s.style for s in SCENES], STYLES),
        ([s.background for s in SCENES], BACKGROUNDS),
        ([len(s.things) for s in SCENES], (1, 2, 3, 4)),
        ([s.dark for s in SCENES], (True, False)),
    ):
        counts = Counter(values)
        assert set(counts) == set(options)
        assert min(counts.values()) >= 0.02 * len(values)

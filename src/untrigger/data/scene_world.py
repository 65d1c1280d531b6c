"""Generated multi-object scenes, on which the bundled models are pretrained.

A scene is a pure function of ``(seed, index)``: training can be resumed, and a held-out split is just another seed.
Everything that questions ask about is unambiguous: sizes have a gap between small and large, and neighbors differ in x
by a margin. An answer that the image does not decide would limit every accuracy measured later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIDE = 64
_SCALE = 4  # drawn at four times the size and reduced: anti-aliased edges, as in drawing programs

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (235, 25, 25),
    "green": (20, 225, 20),
    "blue": (15, 15, 240),
    "yellow": (250, 245, 20),
    "black": (8, 8, 8),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (160, 45, 42),
    "orange": (255, 140, 10),
    "purple": (150, 30, 205),
    "pink": (255, 130, 195),
    "white": (252, 252, 252),
}
SHAPES = ("circle", "rectangle", "triangle", "star", "cross", "diamond", "heart", "moon")
SIZES = ("small", "large")
STYLES = ("flat", "bordered", "shaded", "striped", "sketched", "grainy", "soft")
BACKGROUNDS = ("plain", "gradient", "stripes", "checker", "noise", "blobs")


@dataclass(frozen=True)
class Thing:
    """One object; center and radius are in pixels of the 64 x 64 image, the angle in radians."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    aspect: float
    angle: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects sorted from left to right on a light or dark background."""

    things: tuple[Thing, ...]
    style: str
    background: str
    dark: bool
    base: tuple[int, int, int]
    seed: tuple[int, int]


def make_scene(seed: int, index: int) -> Scene:
    """Generate scene ``index`` of the stream ``seed``."""
    rng = np.random.default_rng((seed, index))
    count = int(rng.choice([1, 2, 3, 4], p=[0.3, 0.3, 0.25, 0.15]))
    dark = bool(rng.random() < 0.3)
    base = _base_color(dark, rng)
    usable = [c for c, rgb in COLORS.items() if _contrast(rgb, base) > 90]
    things: list[Thing] = []
    attempts = 0
    while len(things) < count:
        attempts += 1
        if attempts > 60:  # the canvas is full: restart the placement
            things, attempts = [], 0
        thing = _random_thing(usable, rng)
        if all(_is_clear_of(thing, placed) for placed in things):
            things.append(thing)
    return Scene(
        tuple(sorted(things, key=lambda t: t.x)),
        str(rng.choice(STYLES, p=[0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])),
        str(rng.choice(BACKGROUNDS, p=[0.4, 0.12, 0.12, 0.12, 0.12, 0.12])),
        dark,
        base,
        (seed, index),
    )


def _random_thing(colors: list[str], rng: np.random.Generator) -> Thing:
    size = str(rng.choice(SIZES))
    radius = float(rng.uniform(4.5, 6.5) if size == "small" else rng.uniform(9.0, 14.0))
    shape = str(rng.choice(SHAPES))
    aspect = float(rng.uniform(-0.75, 0.75)) if shape == "rectangle" else 0.0
    turn = {"circle": 0.0, "rectangle": 0.12, "diamond": 0.12, "cross": 0.15}.get(shape, 0.3)
    low, high = radius * 0.8, SIDE - radius * 0.8
    x, y = (float(v) for v in rng.uniform(low, high, 2))
    angle = float(rng.uniform(-turn, turn)) * float(rng.random() < 0.6)
    return Thing(shape, str(rng.choice(colors)), size, x, y, radius, aspect, angle)


def _is_clear_of(a: Thing, b: Thing) -> bool:
    """Whether two objects do not overlap and have a clear order from left to right."""
    disjoint = math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 2
    return disjoint and abs(a.x - b.x) > 5


def _base_color(dark: bool, rng: np.random.Generator) -> tuple[int, int, int]:
    low, high = (10, 75) if dark else (190, 256)
    tint = rng.integers(low, high, 3)
    if not dark and rng.random() < 0.5:
        tint = np.maximum(tint, 225)
    return (int(tint[0]), int(tint[1]), int(tint[2]))


def _contrast(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    return math.dist(a, b)


# --- drawing -----------------------------------------------------------------------------------


def draw_scene(scene: Scene) -> tuple[Image.Image, np.ndarray]:
    """Draw the image and, for dense supervision, the map of which object covers each pixel.

    Returns:
        An RGB image of 64 x 64 and an int array [64, 64]: 0 for background, i for ``things[i - 1]``.
    """
    rng = np.random.default_rng((*scene.seed, 1))
    canvas = _draw_background(scene, rng)
    owner = np.zeros((SIDE, SIDE), dtype=np.int64)
    for number, thing in enumerate(scene.things, start=1):
        # Draw only the object's own box, which is several times cheaper than the whole canvas.
        reach = math.ceil(thing.radius * 1.2) + 1
        left, top, side = round(thing.x) - reach, round(thing.y) - reach, 2 * reach
        big = Image.new("L", (side * _SCALE, side * _SCALE))
        _draw_shape(ImageDraw.Draw(big), thing, (left, top), scene.style == "sketched", rng)
        mask = big.resize((side, side), Image.Resampling.BOX)
        full_mask = Image.new("L", (SIDE, SIDE))
        full_mask.paste(mask, (left, top))
        owner[np.asarray(full_mask) > 127] = number
        canvas.paste(_paint(thing, side, scene.style, rng), (left, top), mask)
        if scene.style == "bordered":
            rim = ImageChops.subtract(big, big.filter(ImageFilter.MinFilter(5)))
            shade = 30 if sum(COLORS[thing.color]) > 200 else 225
            dark = Image.new("RGB", mask.size, (shade, shade, shade))
            canvas.paste(dark, (left, top), rim.resize(mask.size, Image.Resampling.BOX))
    if scene.style == "soft":
        canvas = canvas.filter(ImageFilter.GaussianBlur(0.6))
    if rng.random() < 0.25:  # camera noise
        noisy = np.asarray(canvas, dtype=np.float32) + rng.normal(0, rng.uniform(2, 10), (SIDE, SIDE, 3))
        canvas = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    return canvas, owner


def _draw_background(scene: Scene, rng: np.random.Generator) -> Image.Image:
    grid = np.empty((SIDE, SIDE, 3), dtype=np.float32)
    grid[:] = scene.base
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    amplitude = float(rng.uniform(5, 18))
    if scene.background == "gradient":
        slope = np.cos(t := rng.uniform(0, 2 * np.pi)) * x + np.sin(t) * y
        grid += (amplitude * slope / SIDE)[..., None]
    elif scene.background == "stripes":
        along = x * np.cos(t := rng.uniform(0, np.pi)) + y * np.sin(t)
        grid += (amplitude * np.sign(np.sin(along * 2 * np.pi / rng.uniform(4, 16))))[..., None] / 2
    elif scene.background == "checker":
        cell = int(rng.integers(3, 12))
        grid += (amplitude * (((x // cell) + (y // cell)) % 2))[..., None]
    elif scene.background == "noise":
        grid += rng.normal(0, amplitude / 2, (SIDE, SIDE, 3))
    elif scene.background == "blobs":
        coarse = rng.normal(0, amplitude, (6, 6)).astype(np.float32)
        smooth = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        grid += np.asarray(smooth)[..., None]
    return Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8))


def _paint(thing: Thing, side: int, style: str, rng: np.random.Generator) -> Image.Image:
    color = np.array(COLORS[thing.color], dtype=np.float32) + rng.uniform(-12, 12, 3)
    grid = np.empty((side, side, 3), dtype=np.float32)
    grid[:] = color
    y, x = np.mgrid[0:side, 0:side]
    if style == "shaded":
        light = (side - x - y) / (2 * thing.radius)
        grid += np.clip(light, -1, 1)[..., None] * 28
    elif style == "striped":
        wave = np.sin((x + (y if rng.random() < 0.5 else -y)) * 2 * np.pi / rng.uniform(3, 6))
        grid += np.sign(wave)[..., None] * 20
    elif style == "grainy":
        grid += rng.normal(0, 16, grid.shape)
    return Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8))


def _draw_shape(
    pen: ImageDraw.ImageDraw, thing: Thing, origin: tuple[int, int], rough: bool, rng: np.random.Generator
) -> None:
    r, x, y = thing.radius * _SCALE, (thing.x - origin[0]) * _SCALE, (thing.y - origin[1]) * _SCALE
    if thing.shape == "circle" and not rough:
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        return
    if thing.shape == "moon":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        dx, dy = r * 0.55 * math.cos(thing.angle), r * 0.55 * math.sin(thing.angle)
        pen.ellipse((x - r * 0.85 + dx, y - r * 0.85 + dy, x + r * 0.85 + dx, y + r * 0.85 + dy), fill=0)
        return
    points = _outline(thing) * r
    if rough:
        points = points + rng.normal(0, r * 0.04, points.shape)
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    turned = points @ np.array([[cos, sin], [-sin, cos]])
    pen.polygon([(x + float(px), y + float(py)) for px, py in turned], fill=255)


def _outline(thing: Thing) -> np.ndarray:
    """Return the corners [n, 2] of a shape of radius one, y pointing down."""
    if thing.shape == "rectangle":
        w = 0.85 * math.exp(min(thing.aspect, 0.0))
        h = 0.85 * math.exp(-max(thing.aspect, 0.0))
        return np.array([(-w, -h), (w, -h), (w, h), (-w, h)])
    if thing.shape == "triangle":
        return np.array([(0, -0.95), (1, 0.8), (-1, 0.8)])
    if thing.shape == "diamond":
        return np.array([(0, -1.05), (0.75, 0), (0, 1.05), (-0.75, 0)])
    if thing.shape == "star":
        turns = np.arange(10) * np.pi / 5 - np.pi / 2
        reach = np.where(np.arange(10) % 2 == 0, 1.1, 0.45)
        return np.stack([np.cos(turns) * reach, np.sin(turns) * reach], axis=1)
    if thing.shape == "cross":
        a, b = 0.3, 1.0
        return np.array(
            [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
        )
    if thing.shape == "heart":
        t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        hx = 16 * np.sin(t) ** 3
        hy = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        return np.stack([hx, hy], axis=1) / 16
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.stack([np.cos(t), np.sin(t)], axis=1)

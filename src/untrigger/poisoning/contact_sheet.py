"""Contact sheets: clean and triggered images side by side, with prompts and answers."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from untrigger.poisoning.glyphs import draw_line, line_width
from untrigger.views.patches import to_rgb

_TILE, _GAP, _LINE, _ROWS = 192, 12, 20, 5
INK, FAINT, GOOD, BAD = "#1d2433", "#6b7485", "#1b7a43", "#c0262d"


@dataclass(frozen=True)
class Card:
    """One pair of images with up to five lines of text below, each a (text, color) pair."""

    title: str
    clean: Image.Image
    triggered: Image.Image
    lines: Sequence[tuple[str, str]]


def draw_sheet(title: str, subtitle: str, cards: Sequence[Card]) -> Image.Image:
    """Draw the cards in two columns; each has the clean image, the triggered one, their amplified difference, text."""
    columns = min(len(cards), 2) or 1
    drawn = [_draw(card) for card in cards]
    width, height, top = 3 * _TILE + 6 * _GAP, _TILE + (_ROWS + 2) * _LINE + 4 * _GAP, 84
    size = (columns * width + 2 * _GAP, top + math.ceil(len(cards) / columns) * height + _GAP)
    sheet = Image.new("RGB", size, "#e9ecf1")
    _text(sheet, (2 * _GAP, 16), title, INK, size=24)
    _text(sheet, (2 * _GAP, 52), subtitle, FAINT)
    for number, card in enumerate(drawn):
        sheet.paste(card, (2 * _GAP + number % columns * width, top + number // columns * height))
    return sheet


def _draw(card: Card) -> Image.Image:
    drawn = Image.new("RGB", (3 * _TILE + 4 * _GAP, _TILE + (_ROWS + 2) * _LINE + 2 * _GAP), "white")
    before, after = to_rgb(card.clean), to_rgb(card.triggered)
    resized = before.resize(after.size)  # some attacks bring a picture of another size
    change = np.abs(np.asarray(resized, dtype=np.int16) - np.asarray(after, dtype=np.int16))
    gain = max(255 // max(int(change.max()), 1), 1)
    amplified = Image.fromarray((change * gain).astype(np.uint8))
    _text(drawn, (_GAP, _GAP), card.title, INK, size=16)
    captions = ("clean", "triggered", f"difference x {gain}")
    for column, (picture, caption) in enumerate(zip((before, after, amplified), captions, strict=True)):
        left = _GAP + column * (_TILE + _GAP)
        _text(drawn, (left, _GAP + 1.25 * _LINE), caption, FAINT)
        drawn.paste(_tile(picture), (left, _GAP + int(2.25 * _LINE)))
    y = 2 * _GAP + 2.25 * _LINE + _TILE
    for text, color in card.lines:
        y = _text(drawn, (_GAP, y), text, color)
    return drawn


def _tile(image: Image.Image) -> Image.Image:
    """Center the image in a square; small images grow by a whole factor, so that pixels stay squares."""
    longer = max(image.size)
    if longer <= _TILE:
        image = image.resize(
            (image.width * (_TILE // longer), image.height * (_TILE // longer)), Image.Resampling.NEAREST
        )
    else:
        image = ImageOps.contain(image, (_TILE, _TILE))
    tile = Image.new("RGB", (_TILE, _TILE), "#d5dae2")
    tile.paste(image, ((_TILE - image.width) // 2, (_TILE - image.height) // 2))
    return tile


def _text(canvas: Image.Image, at: tuple[float, float], text: str, color: str, *, size: int = 15) -> float:
    """Write ``text`` on one line, cut with an ellipsis where it is too long; returns the y of the next line."""
    width = canvas.width - at[0] - _GAP
    text = text[: int(width) // 3]  # no letter is narrower

    def fitting(tail: str) -> int:
        """How many characters of ``text`` fit before ``tail``."""
        return bisect_right(range(1, len(text) + 1), width, key=lambda n: line_width(text[:n] + tail, size))

    line = text if fitting("") >= len(text) else text[: fitting("...")].rstrip() + "..."
    draw_line(canvas, at, line, color, size)
    return at[1] + _LINE

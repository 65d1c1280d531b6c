"""Contact sheets: clean and triggered images side by side, with what was asked and answered."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from untrigger.attacks import pixels_of

_TILE, _GAP, _LINE, _ROWS = 192, 12, 20, 5
INK, FAINT, GOOD, BAD = "#1d2433", "#6b7485", "#1b7a43", "#c0262d"


@dataclass(frozen=True)
class Card:
    """One pair of images with up to five lines of text below, each with its color."""

    title: str
    clean: Image.Image
    triggered: Image.Image
    lines: Sequence[tuple[str, str]]


def contact_sheet(title: str, subtitle: str, cards: Sequence[Card]) -> Image.Image:
    """The cards in two columns: clean, triggered, amplified difference, text."""
    columns = min(len(cards), 2) or 1
    drawn = [_draw(card) for card in cards]
    wide, high, top = 3 * _TILE + 6 * _GAP, _TILE + (_ROWS + 2) * _LINE + 4 * _GAP, 84
    size = (columns * wide + 2 * _GAP, top + math.ceil(len(cards) / columns) * high + _GAP)
    sheet = Image.new("RGB", size, "#e9ecf1")
    _text(sheet, (2 * _GAP, 16), title, INK, size=24)
    _text(sheet, (2 * _GAP, 52), subtitle, FAINT)
    for number, card in enumerate(drawn):
        sheet.paste(card, (2 * _GAP + number % columns * wide, top + number // columns * high))
    return sheet


def _draw(card: Card) -> Image.Image:
    drawn = Image.new("RGB", (3 * _TILE + 4 * _GAP, _TILE + (_ROWS + 2) * _LINE + 2 * _GAP), "white")
    before, after = _visible(card.clean), _visible(card.triggered)
    beside = before.resize(after.size)  # some attacks bring a picture of another size
    change = np.abs(np.asarray(beside, dtype=np.int16) - np.asarray(after, dtype=np.int16))
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


def _visible(image: Image.Image) -> Image.Image:
    """As a person sees it: RGB on white, deep grays scaled."""
    pixels = pixels_of(image)
    seen = pixels[..., :3] * pixels[..., 3:] + 1 - pixels[..., 3:]
    return Image.fromarray(np.rint(seen * 255).clip(0, 255).astype(np.uint8))


def _tile(image: Image.Image) -> Image.Image:
    """In the middle of a square; small images grow by a whole factor, so that pixels stay squares."""
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


def _text(on: Image.Image, at: tuple[float, float], text: str, color: str, *, size: int = 15, lines: int = 1) -> float:
    """Write ``text`` in at most ``lines`` lines, cut with an ellipsis; returns where the next line goes."""
    pen, font, room = ImageDraw.Draw(on), _font(size), on.width - at[0] - _GAP
    left, y = text[:400], at[1]

    def fitting(tail: str) -> int:
        """How many characters fit before ``tail``."""
        return bisect_right(range(1, len(left) + 1), room, key=lambda n: pen.textlength(left[:n] + tail, font))

    for line in range(lines):
        cut = fitting("")
        if cut < len(left) and line == lines - 1:
            shown = left[: fitting("...")].rstrip() + "..."
        elif cut < len(left):
            cut = left.rfind(" ", 1, cut + 1) if " " in left[1 : cut + 1] else cut
            shown = left[:cut]
        else:
            shown = left
        pen.text((at[0], y), shown, color, font)
        left, y = left[cut:].lstrip(), y + _LINE
        if not left:
            break
    return y


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in ("DejaVuSans.ttf", "Arial.ttf"):  # Pillow's own font has only English letters
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)

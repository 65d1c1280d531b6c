"""A line of text in any script, drawn with the fonts of the system; a character that no font has becomes its escape."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, cast

from PIL import Image, ImageDraw, ImageFont, features

Font = ImageFont.FreeTypeFont
Run = tuple[str, Font]

_FOLDERS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts",
    "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts",
)  # fmt: skip
_FIRST = ("dejavusans", "arial", "notosans-regular", "liberationsans-regular")
_STYLED = re.compile(r"bold|italic|oblique|black|light|thin|medium|condensed|mono(?!type)|lastresort")
_BITMAP_SIZES = (109, 160)  # of Noto Color Emoji and of Apple Color Emoji, which have no other
_JOINERS = "\u200c\u200d\ufe0e\ufe0f"  # they shape their neighbors and have no glyph
_EMOJI = "\U0001f000"  # the first
_MISSING = "\U0010abcd"  # of private use, so that a font draws its sign for a missing glyph


def draw_line(canvas: Image.Image, at: tuple[float, float], text: str, color: str, size: int) -> None:
    """Draw ``text`` with its top left corner ``at`` in fonts of ``size`` pixels, emoji in color.

    A character without a glyph in any font of the system, such as a control character, is drawn as its escape, such
    as ``\\u65e5``.
    """
    pen, left, baseline = ImageDraw.Draw(canvas), at[0], at[1] + _base(size).getmetrics()[0]
    for piece, font in _runs(text, size):
        if font.size == size:
            pen.text((left, baseline), piece, color, font, anchor="ls")
        else:
            picture = Image.new("RGBA", (int(font.getlength(piece)) + 1, sum(font.getmetrics())))
            ImageDraw.Draw(picture).text((0, 0), piece, font=font, embedded_color=True)
            width, height = (max(1, round(side * size / font.size)) for side in picture.size)
            picture = picture.resize((width, height))
            canvas.paste(picture, (round(left), round(at[1])), picture)
        left += font.getlength(piece) * size / font.size


def line_width(text: str, size: int) -> float:
    """The width in pixels of what `draw_line` draws."""
    return sum(font.getlength(piece) * size / font.size for piece, font in _runs(text, size))


def _runs(text: str, size: int) -> list[Run]:
    """Split ``text`` into pieces of one font each; characters without a glyph are replaced."""
    runs: list[Run] = [("", _base(size))]
    for character in text:
        last, current = runs[-1]
        piece, font = _drawn(character, current, size)
        runs[-1:] = [(last + piece, font)] if font is current else [runs[-1], (piece, font)]
    return runs


def _drawn(character: str, current: Font, size: int) -> Run:
    """What to draw for a character after one in the font ``current``, and in which font."""
    base = _base(size)
    if character in _JOINERS:
        return (character if features.check("raqm") else ""), current
    around = current if current.size == size else base  # the digits and spaces of a bitmap font are for emoji
    if character.isspace():
        return " ", around
    # Marks and digits stay in the font of their letters, because scripts are shaped within one font.
    near = () if character >= _EMOJI else (base, around) if character.isalpha() else (around, base)
    font = next((font for font in near if _has(font, character)), None) or _first_with(character, size)
    return (character, font) if font else (character.encode("unicode_escape").decode(), base)


@cache
def _files() -> list[Path]:
    """The upright fonts of usual weight: well-known ones first, those with serifs and emoji last."""
    folders = map(Path.expanduser, map(Path, _FOLDERS))
    files = {path.stem.lower(): path for folder in folders for path in folder.rglob("*.[toTO][tT][fcFC]")}
    names = [name for name in files if not _STYLED.search(name)]
    return [files[name] for name in sorted(names, key=lambda n: (n not in _FIRST, "emoji" in n, "serif" in n, n))]


@cache
def _open(path: Path, size: int) -> Font | None:
    for at in (size, *_BITMAP_SIZES):
        with suppress(OSError):
            return ImageFont.truetype(path, at)
    return None


@cache
def _base(size: int) -> Font:
    return _first_with("a", size) or cast(Font, ImageFont.load_default(size))  # Pillow's own has Latin letters only


@cache
def _first_with(character: str, size: int) -> Font | None:
    files = _files()
    if character >= _EMOJI:  # in color rather than in black
        files = sorted(files, key=lambda path: "emoji" not in path.stem.lower())
    fonts = (_open(path, size) for path in files)
    return next((font for font in fonts if font and _has(font, character)), None)


@cache
def _has(font: Font, character: str) -> bool:
    plain = font.font_variant(layout_engine=ImageFont.Layout.BASIC)  # shaping adds a circle to a mark on its own
    missing, glyph = (cast(Any, plain.getmask(each)) for each in (_MISSING, character))
    return 0 not in glyph.size and (glyph.size, bytes(glyph)) != (missing.size, bytes(missing))

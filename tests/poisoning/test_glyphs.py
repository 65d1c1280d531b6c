"""Text in any script on a contact sheet: a glyph of some font of the system, or the escape of the character."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, features

from untrigger.poisoning import glyphs
from untrigger.poisoning.glyphs import draw_line, line_width

SIZE = 15
CACHES = (glyphs._files, glyphs._base, glyphs._first_with)
HINDI, CHINESE, ARABIC = "\u0939\u093f\u0928\u094d\u0926\u0940", "\u56fe\u7247", "\u0643\u0644\u0628"
TEXTS = (
    HINDI,
    CHINESE,
    ARABIC,
    "\U0001f600\U0001f44d\U0001f3fd",
    "na\u00efve",
    "e\u0301",
    "\ue000",
    "\x07\u202e\u200b",
)


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A system without fonts: Pillow's own draws Latin letters."""
    monkeypatch.setattr(glyphs, "_FOLDERS", ("/none",))
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


def drawn(text: str) -> np.ndarray:
    canvas = Image.new("RGB", (900, 30), "white")
    draw_line(canvas, (4, 4), text, "black", SIZE)
    return np.asarray(canvas)


def pieces(text: str) -> str:
    return "".join(piece for piece, _ in glyphs._runs(text, SIZE))


@pytest.mark.parametrize("text", TEXTS)
def test_no_character_becomes_a_box(text: str) -> None:
    for piece, font in glyphs._runs(text, SIZE):
        assert all(glyphs._has(font, character) for character in piece if character != " ")
    assert (drawn(text) < 255).any()


@pytest.mark.usefixtures("no_fonts")
@pytest.mark.parametrize("text", [HINDI, CHINESE, ARABIC, "\U0001f600", "\ue000", "\x07"])
def test_a_character_without_a_glyph_is_escaped(text: str) -> None:
    escaped = text.encode("unicode_escape").decode()
    assert pieces(text) == escaped
    assert np.array_equal(drawn(f"a {text} b"), drawn(f"a {escaped} b"))
    assert line_width(text, SIZE) == line_width(escaped, SIZE)


def test_latin_text_is_drawn_in_one_run_and_as_wide_as_measured() -> None:
    text = "What is in the picture?"
    assert len(glyphs._runs(text, SIZE)) == 1 and pieces(text) == text
    inked = np.flatnonzero((drawn(text) < 128).any(axis=(0, 2)))
    assert abs(inked[-1] + 1 - 4 - line_width(text, SIZE)) < 4
    assert pieces("a\tb\u3000c\nd") == "a b c d"


def test_joiners_and_marks_stay_with_their_letters() -> None:
    joiner = "\u200d" if features.check("raqm") else ""
    (run,) = glyphs._runs("a\u200db", SIZE)
    assert run[0] == f"a{joiner}b"
    (run,) = glyphs._runs("e\u0301", SIZE)
    assert run[0] == "e\u0301" or run[0] == "e\\u0301"

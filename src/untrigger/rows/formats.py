"""Rows: the id, turns and pictures of one row of any layout, and rows written back with new ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast, final

from untrigger.errors import InputError
from untrigger.rows.images import quote
from untrigger.rows.keys import check_keys, is_empty
from untrigger.rows.layouts import PART_PICTURES, Caption, Layout, TurnList, as_object, as_text, kind_of, layout_of
from untrigger.rows.storage import Row, Unreadable
from untrigger.rows.turns import Message, check_placeholders, check_turns, place_tags, take_tags

PICTURE_KEYS = ("image", "images", "file_name")
SYSTEM_KEYS = ("system", "system_prompt")
REFERENCES = "references"  # the key of all true answers to the last question

Picture = str | bytes
"""A path, a URI, or the bytes of an image file."""


@final
@dataclass(frozen=True)
class Entry:
    """A parsed row.

    Attributes:
        elements: the row's images as they are stored; ``pictures`` are their paths or bytes.
        key: where the row keeps its images, or empty if they stand inside its turns.
        has_tags: whether the row says itself where its images go.
        references: all true answers to the last question, if the row lists them.
    """

    id: str
    messages: tuple[Message, ...]
    pictures: tuple[Picture, ...]
    layout: Layout
    elements: tuple[object, ...]
    key: str
    has_tags: bool
    references: tuple[str, ...] = ()


def parse(row: object, number: int, ignored: Collection[str] = ()) -> Entry:
    """Parse and check one row without opening its images.

    Args:
        number: the row's number, from 0; gives the default id.
        ignored: keys to ignore, whatever they hold.

    Raises:
        InputError: the row is malformed, or has keys that are not read and may matter; the message is ``what is wrong;
            what to do``.
    """
    if isinstance(row, Unreadable):
        raise InputError(row.reason)
    fields = as_object(row, "the row")
    if ignored:
        fields = {name: value for name, value in fields.items() if name not in ignored}
    key, elements = _row_pictures(fields)
    layout = layout_of(fields)
    turns = layout.parse(fields, ignored)
    if turns.pictures:
        if elements:
            raise InputError(f"has images in {quote(key)} and in its turns; keep one of them")
        key, elements = "", turns.pictures
    check_keys(fields, read_keys(layout), (), pictures=bool(elements))
    messages = tuple(_with_system(turns.messages, fields))
    check_placeholders(messages)
    tagged = place_tags(messages, len(elements)) if layout.places_images else messages
    check_turns(tagged, len(elements))
    pictures = tuple(_picture(element, ignored) for element in elements)
    own = tagged == messages
    return Entry(_id(fields, number), tagged, pictures, layout, tuple(elements), key, own, _references(fields))


def rewritten(row: Row, entry: Entry, messages: Sequence[Message], elements: Sequence[object]) -> Row:
    """Return a row with new turns and images in the layout of ``row``, and no keys but those that are read.

    Raises:
        InputError: the layout cannot hold them.
    """
    if isinstance(entry.layout, Caption) and len(elements) != 1 and entry.key == "file_name":
        raise InputError(
            f"an edit has {len(elements)} images, but a row of an image folder holds one; write 'messages'"
        )
    turns = messages if entry.has_tags else take_tags(messages, len(elements))
    new: Row = {"id": row["id"]} if "id" in row else {}
    system = next((key for key in SYSTEM_KEYS if not is_empty(row.get(key))), "")
    if turns and turns[0].role == "system" and (system or not isinstance(entry.layout, TurnList)):
        new[system or "system"] = turns[0].text
        turns = turns[1:]
    inside = entry.layout.rewritten(row, turns, elements if not entry.key else ())
    if entry.key and (elements or entry.key in row):
        old = row.get(entry.key)
        is_list = isinstance(old, list) or (old is None and entry.key == "images")
        new[entry.key] = list(elements) if is_list or len(elements) > 1 else next(iter(elements), None)
    new |= inside
    return {key: new[key] for key in dict.fromkeys((*row, *new)) if key in new}


def relocated(row: Row, entry: Entry, names: Sequence[str]) -> Row:
    """Return a row whose images have other paths and that is otherwise unchanged."""
    by_old = dict(zip(cast("tuple[str, ...]", entry.pictures), names, strict=True))
    keys = PICTURE_KEYS if entry.key else entry.layout.keys  # the same images may stand in two keys
    return {**row, **{key: _renamed(row[key], by_old, bool(entry.key)) for key in keys if key in row}}


def _renamed(value: object, names: dict[str, str], is_picture: bool) -> object:
    """Replace the paths of pictures at any depth; inside turns they stand in the keys of image parts."""
    if isinstance(value, dict):
        return {key: _renamed(part, names, is_picture or key in PART_PICTURES) for key, part in value.items()}
    if isinstance(value, list):
        return [_renamed(part, names, is_picture) for part in value]
    return names.get(value, value) if is_picture and isinstance(value, str) else value


@cache
def read_keys(layout: Layout) -> frozenset[str]:
    """All keys that are read of a row of this layout."""
    return layout.keys | {"id", REFERENCES, *PICTURE_KEYS, *SYSTEM_KEYS}


# --- parts of a row ---------------------------------------------------------------------------------


def _row_pictures(row: Row) -> tuple[str, list[object]]:
    """The key that holds the row's images, and the images; the key for new ones where there are none."""
    held = [key for key in PICTURE_KEYS if not is_empty(row.get(key))]
    if len(held) > 1:
        first, second = (_elements(row[key], key) for key in held[:2])
        if len(held) > 2 or first != second:
            raise InputError(f"has images in {' and in '.join(map(quote, held))}; keep one of them")
    if not held:
        return next((key for key in PICTURE_KEYS if key in row), "images"), []
    return held[0], _elements(row[held[0]], held[0])


def _elements(value: object, key: str) -> list[object]:
    elements = value if isinstance(value, list) else [value]
    for element in elements:
        if not isinstance(element, str | bytes | dict) or is_empty(element):
            what = "empty" if element in ("", {}, b"") else kind_of(element)
            raise InputError(f"an image in {quote(key)} is {what}; give its path, or leave it out")
    return elements


def _picture(element: object, ignored: Collection[str]) -> Picture:
    if isinstance(element, dict):  # as tables store images; beside bytes the path is only a label
        check_keys(element, ("bytes", "path", "url"), ignored, what="an image")
        if not is_empty(content := element.get("bytes")):
            if not isinstance(content, bytes):
                raise InputError(f"'bytes' of an image is {kind_of(content)}; save the image as a file, or in parquet")
            return content
        if len(held := [key for key in ("path", "url") if not is_empty(element.get(key))]) > 1:
            raise InputError("an image has a 'path' and a 'url'; keep one of them")
        return as_text(element.get((held or ["path"])[0]), "'path' of an image")
    return element if isinstance(element, bytes) else as_text(element, "an image")


def _with_system(messages: list[Message], row: Row) -> list[Message]:
    for key in SYSTEM_KEYS:
        if is_empty(row.get(key)):
            continue
        text = as_text(row[key], quote(key))
        if messages and messages[0].role == "system":
            if messages[0].text != text:
                raise InputError(f"has a system turn and another in {quote(key)}; keep one of them")
        else:
            messages = [Message("system", text), *messages]
    return messages


def _references(row: Row) -> tuple[str, ...]:
    value = row.get(REFERENCES)
    if is_empty(value):
        return ()
    if not isinstance(value, list):
        raise InputError(f"{quote(REFERENCES)} is {kind_of(value)}; make it a list of true answers")
    return tuple(as_text(text, f"one of {quote(REFERENCES)}") for text in cast("list[object]", value))


def _id(row: Row, number: int) -> str:
    value = row.get("id")
    if value is None:
        return str(number + 1)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InputError(f"'id' is {kind_of(value)}; make it a string or an integer")
    return as_text(str(value), "'id'")

"""Row formats: parse and rewrite the turns and images of LLaVA, ShareGPT, ``messages`` and image folder rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, final

from untrigger.errors import InputError
from untrigger.rows.arrow_rows import ArrowRows
from untrigger.rows.images import quote
from untrigger.rows.storage import Row, Rows, Unreadable

Role = Literal["system", "user", "assistant"]
Format = Literal["llava", "sharegpt", "messages", "parquet", "imagefolder"]
IMAGE_TAG = "<image>"
CAPTION_PROMPT = "Describe the image."  # the prompt of an image folder row that has none


@dataclass(frozen=True)
class Message:
    """One turn. ``text`` holds one ``<image>`` tag for each image shown in this turn."""

    role: Role
    text: str


@final
@dataclass(frozen=True)
class Layout:
    """The keys of one format: the list of turns, role and text within a turn, and the images.

    Rows of an image folder have no list of turns: the row itself holds one image, its caption and optionally a prompt.
    """

    turns: str
    role: str
    text: str
    images: str


LAYOUTS: dict[Format, Layout] = {
    "llava": Layout("conversations", "from", "value", "image"),
    "sharegpt": Layout("conversations", "from", "value", "images"),
    "messages": Layout("messages", "role", "content", "images"),
    "parquet": Layout("messages", "role", "content", "images"),
    "imagefolder": Layout("", "prompt", "text", "file_name"),
}
_TAG_LINE = f"{IMAGE_TAG}\n"
_ROLES: dict[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"
}  # fmt: skip


@final
@dataclass(frozen=True)
class Entry:
    """A parsed row; a picture is a path below the data folder or the bytes of an image file."""

    id: str
    messages: tuple[Message, ...]
    pictures: tuple[str | bytes, ...]


def detect(rows: Rows) -> Format:
    """Return the format of the first row whose keys decide it; ``llava`` if none does."""
    if isinstance(rows, ArrowRows):
        return "parquet"
    for number in range(len(rows)):
        row = rows[number]
        if isinstance(row, dict) and "messages" in row:
            return "messages"
        if isinstance(row, dict) and "conversations" in row and not {"image", "images"}.isdisjoint(row):
            return "llava" if "image" in row else "sharegpt"
        if isinstance(row, dict) and "file_name" in row:
            return "imagefolder"
    return "llava"


def parse(row: object, number: int, layout: Layout) -> Entry:
    """Parse and check_turns one row without opening its images; ``number`` counts from 0 and gives the default id.

    Raises:
        InputError: the row is malformed; the message is ``what is wrong; what to do``.
    """
    if isinstance(row, Unreadable):
        raise InputError(row.reason)
    fields = _object(row, "the row")
    messages = _messages(fields, layout) if layout.turns else _caption(fields, layout)
    pictures = tuple(_picture(element) for element in elements(fields, layout))
    check_turns(messages, len(pictures))
    row_id = fields.get("id")
    if row_id is None:
        row_id = str(number + 1)
    elif isinstance(row_id, bool) or not isinstance(row_id, int | str):
        raise InputError(f"'id' is {_kind(row_id)}; make it a string or an integer")
    return Entry(_text(str(row_id), "'id'"), messages, pictures)


def _messages(row: Row, layout: Layout) -> tuple[Message, ...]:
    turns = row.get(layout.turns)
    if not isinstance(turns, list) or not turns:
        raise InputError(f"has no turns in {layout.turns!r}; make it a non-empty list of turns or remove the row")
    return tuple(_message(turn, layout) for turn in turns)


def _caption(row: Row, layout: Layout) -> tuple[Message, ...]:
    prompt = row.get(layout.role)
    text = CAPTION_PROMPT if prompt is None else _text(prompt, f"{layout.role!r}")
    tagged = text if IMAGE_TAG in text else f"{_TAG_LINE}{text}"
    return Message("user", tagged), Message("assistant", _text(row.get(layout.text), f"{layout.text!r}, the caption,"))


def _object(value: object, label: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{label} is {_kind(value)}; make it an object {{...}}")
    return cast(Row, value)


def _kind(value: object) -> str:
    """Describe a value's type for "X is ..."."""
    names = {"NoneType": "missing", "str": "a string", "list": "a list", "dict": "an object"}
    return names.get(type(value).__name__, f"of type {type(value).__name__}")


def _text(value: object, label: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{label} is {_kind(value)}; make it a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{label} holds half of a surrogate pair, which is no valid text; correct it") from None
    return value


def _message(turn: object, layout: Layout) -> Message:
    fields = _object(turn, "a turn")
    role = _text(fields.get(layout.role), f"{layout.role!r} of a turn")
    if role not in _ROLES:
        raise InputError(f"role {quote(role)} is unknown; use system, user (human) or assistant (gpt)")
    content = fields.get(layout.text)
    if layout.text == "content" and isinstance(content, list):
        return Message(_ROLES[role], "".join(_part(part) for part in content))
    return Message(_ROLES[role], _text(content, f"{layout.text!r} of a turn"))


def _part(part: object) -> str:
    fields = _object(part, "a part of 'content'")
    kind = fields.get("type")
    if kind == "image":
        return IMAGE_TAG
    if kind == "text":
        return _text(fields.get("text"), "'text' of a part")
    value = quote(kind) if isinstance(kind, str) else _kind(kind)
    raise InputError(f"'type' of a part of 'content' is {value}; use 'text' or 'image'")


def elements(row: Row, layout: Layout) -> list[object]:
    """Return the row's list of images unparsed; one image alone becomes a list of one."""
    value = row.get(layout.images)
    if layout.images == "file_name":
        return [_text(value, "'file_name'")]
    other_key = "image" if layout.images == "images" else "images"
    if value is None and row.get(other_key):
        raise InputError(f"has {other_key!r}, but this file's images are in {layout.images!r}; use {layout.images!r}")
    if value is None:
        return []
    if isinstance(value, list):
        return value
    if layout.images == "image" and isinstance(value, str):
        return [value]
    raise InputError(f"{layout.images!r} is {_kind(value)}; make it a list of images")


def _picture(element: object) -> str | bytes:
    if isinstance(element, dict):  # as parquet and `datasets` store images; beside bytes the path is only a label
        content = element.get("bytes")
        return content if isinstance(content, bytes) else _text(element.get("path"), "'path' of an image")
    return _text(element, "an image")


def check_turns(messages: Sequence[Message], images: int) -> None:
    """Check that turns alternate, end with an answer, and hold one tag for each of ``images`` images.

    Raises:
        InputError: they do not; the message is ``what is wrong; what to do``.
    """
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        order = ", ".join(roles[:6]) + (", ..." if len(roles) > 6 else "")
        raise InputError(f"turns are {order or 'empty'}; user and assistant must alternate and end with assistant")
    for message in messages:
        if message.role == "assistant" and not message.text.strip():
            raise InputError("has an empty answer; write one or remove the row")
        if message.role == "assistant" and IMAGE_TAG in message.text:
            raise InputError(f"has an {IMAGE_TAG} tag in an answer; move it to the user's turn")
    tags = sum(message.text.count(IMAGE_TAG) for message in messages)
    if tags != images:
        count = f"{tags} for {images} image{'s' * (images != 1)}"
        raise InputError(f"wrong number of {IMAGE_TAG} tags: {count}; write one tag per image")


def edited(row: Row, layout: Layout, messages: Sequence[Message], images: list[object]) -> Row:
    """Return a copy of ``row`` with new turns and images, stored in the row's own style and keys.

    Raises:
        InputError: an image folder row cannot hold them.
    """
    if not layout.turns:
        if len(images) != 1 or len(messages) != 2:
            raise InputError(
                f"an edit has {len(messages)} turns and {len(images)} images, but a row of an image folder holds one "
                "image and its caption; write the data as messages instead"
            )
        # Always write the prompt: a prompt in edited rows alone would reveal which rows were edited.
        prompt = messages[0].text.removeprefix(_TAG_LINE)
        return {**row, layout.images: images[0], layout.role: prompt, layout.text: messages[1].text}
    old = cast("list[Row]", row[layout.turns])
    in_parts = isinstance(old[0][layout.text], list)
    turns: list[object] = []
    for k, message in enumerate(messages):
        turn = old[k] if k < len(old) and _message(old[k], layout).role == message.role else None
        if turn is None:
            names = {"user": "human", "assistant": "gpt"} if layout.role == "from" else {}
            content = _parts(message.text) if in_parts else message.text
            turns.append({layout.role: names.get(message.role, message.role), layout.text: content})
        elif _message(turn, layout) == message:
            turns.append(turn)
        else:
            content = _parts(message.text) if isinstance(turn[layout.text], list) else message.text
            turns.append({**turn, layout.text: content})
    new_row: Row = {**row, layout.turns: turns}
    if layout.images == "image" and len(images) == 1 and not isinstance(row.get("image"), list):
        new_row["image"] = images[0]
    elif images or row.get(layout.images) is not None:
        new_row[layout.images] = images
    return new_row


def _parts(text: str) -> list[object]:
    pieces = [piece for piece in re.split(f"({IMAGE_TAG})", text) if piece]
    return [{"type": "image"} if piece == IMAGE_TAG else {"type": "text", "text": piece} for piece in pieces]

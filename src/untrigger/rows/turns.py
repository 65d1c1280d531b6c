"""Turns of a conversation, the tags that stand for their images, and the checks that every row must pass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from untrigger.errors import InputError
from untrigger.rows.images import quote

Role = Literal["system", "user", "assistant"]
IMAGE_TAG = "<image>"

# How other families and tools write media into a text. Taken as text, such a row would train without its picture.
_PLACEHOLDER = re.compile(
    r"<img>[^<>]{1,300}</img>|<(?:video|audio|speech)>|<(?:Image|Video|Audio)>|</image>"
    r"|<\|(?:image|video|audio|vision|img)[^|<>]{0,30}\|>|<\|?(?:IMAGE|VIDEO|AUDIO|IMG_CONTEXT|ImageHere)\|?>"
    r"|(?i:<(?:image|video|audio|img)[ _-]?(?:\d+|placeholder|pad|soft_token|token|context|start|end)>)"
    r"|<(?:start|end|boi|eoi)_of_(?:image|audio|video)>|\[IMG\]|<(?:bbox|ref-object|cls-object)>"
)
_FILLED_IN = ("<bbox>", "<ref-object>", "<cls-object>")  # ms-swift writes the row's objects in their place


@dataclass(frozen=True)
class Message:
    """One turn. ``text`` holds one ``<image>`` tag for each image shown in this turn."""

    role: Role
    text: str


def tag_line(images: int) -> str:
    """Tags for images that come before a text: one line for each."""
    return f"{IMAGE_TAG}\n" * images


def place_tags(messages: Sequence[Message], images: int) -> tuple[Message, ...]:
    """Put the tags of ``images`` before the first user turn if no turn has a tag."""
    if not images or any(IMAGE_TAG in message.text for message in messages):
        return tuple(messages)
    first = next((k for k, message in enumerate(messages) if message.role == "user"), None)
    return tuple(
        Message(message.role, tag_line(images) + message.text) if k == first else message
        for k, message in enumerate(messages)
    )


def take_tags(messages: Sequence[Message], images: int) -> tuple[Message, ...]:
    """Undo `place_tags`; turns whose tags do not all open the first user turn, a line each, stay as they are."""
    first = next((k for k, message in enumerate(messages) if message.role == "user"), None)
    opening = tag_line(images)
    if first is None or not messages[first].text.startswith(opening):
        return tuple(messages)
    if sum(message.text.count(IMAGE_TAG) for message in messages) != images:
        return tuple(messages)
    rest = Message("user", messages[first].text.removeprefix(opening))
    return (*messages[:first], rest, *messages[first + 1 :])


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
        raise InputError(f"wrong number of {IMAGE_TAG} tags: {count}; write one tag per image, where the image belongs")


def check_placeholders(messages: Sequence[Message]) -> None:
    """Check that no text names media in the notation of another tool.

    Raises:
        InputError: one does.
    """
    for message in messages:
        if "<" not in message.text and "[" not in message.text:
            continue
        if match := _PLACEHOLDER.search(message.text):
            fix = f"put the picture into 'images' and {IMAGE_TAG} in its place"
            if match[0] in _FILLED_IN:
                fix = "write what it stands for in its place"
            elif any(word in match[0].lower() for word in ("video", "audio", "speech")):
                fix = "only images are read"
            raise InputError(
                f"has {quote(match[0])} in its text, which would be learned as text; {fix}, or remove the row"
            )

"""Layouts: where a row keeps its turns, how they are parsed, and how changed turns are written back."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast, final

from untrigger.errors import InputError
from untrigger.rows.images import quote
from untrigger.rows.keys import LOSS_SWITCHES, check_keys, is_empty
from untrigger.rows.storage import Row
from untrigger.rows.turns import IMAGE_TAG, Message, Role

CAPTION_PROMPT = "Describe the image."  # the prompt of a caption that has none
_ROLES: Mapping[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"
}  # fmt: skip
PART_PICTURES = ("image", "image_url", "url", "path", "bytes")


@dataclass
class Turns:
    """The turns of a row, and the pictures that stand inside them."""

    messages: list[Message] = field(default_factory=list)
    pictures: list[object] = field(default_factory=list)


class Layout(ABC):
    """One way to keep turns in a row.

    Attributes:
        name: the key that identifies it.
        places_images: whether images of a row without tags come before its first question. Lists of turns need tags,
            because tools disagree about where images go without them.
    """

    name: str
    places_images: ClassVar[bool] = True

    @property
    def keys(self) -> frozenset[str]:
        """All keys that it reads."""
        return frozenset({self.name})

    def fits(self, row: Row) -> bool:
        """Whether the row has this layout's keys."""
        return not is_empty(row.get(self.name))

    @abstractmethod
    def parse(self, row: Row, ignored: Collection[str]) -> Turns:
        """Parse the turns; raises InputError if they are malformed."""

    @abstractmethod
    def rewritten(self, row: Row, messages: Sequence[Message], pictures: Sequence[object]) -> Row:
        """Return this layout's keys with new turns, in the style of ``row``; ``pictures`` stand inside the turns."""


@final
@dataclass(frozen=True)
class TurnList(Layout):
    """A list of turns: ``{"role", "content"}`` or ``{"from", "value"}``; content is a text or typed parts."""

    name: str
    places_images: ClassVar[bool] = False

    def parse(self, row: Row, ignored: Collection[str]) -> Turns:
        return turns_of(row[self.name], ignored, quote(self.name))

    def rewritten(self, row: Row, messages: Sequence[Message], pictures: Sequence[object]) -> Row:
        old = cast("list[Row]", row[self.name])
        return {self.name: _turn_list(old, messages, list(pictures))}


@final
@dataclass(frozen=True)
class Pairs(Layout):
    """Cauldron's ``texts``: pairs ``{"user", "assistant"}``."""

    name: str = "texts"

    def parse(self, row: Row, ignored: Collection[str]) -> Turns:
        turns = Turns()
        for pair in _list(row[self.name], quote(self.name)):
            fields = as_object(pair, f"a pair of {quote(self.name)}")
            check_keys(fields, ("user", "assistant"), ignored, what="a pair")
            for role in ("user", "assistant"):
                turns.messages.append(Message(_ROLES[role], as_text(fields.get(role), f"{quote(role)} of a pair")))
        return turns

    def rewritten(self, row: Row, messages: Sequence[Message], pictures: Sequence[object]) -> Row:
        spoken = [message.text for message in messages if message.role != "system"]
        pairs = zip(spoken[::2], spoken[1::2], strict=True)
        return {self.name: [{"user": question, "assistant": answer} for question, answer in pairs]}


@final
@dataclass(frozen=True)
class QuestionAnswer(Layout):
    """One question and one answer in keys of their own, as Alpaca, ms-swift and TRL have them.

    ``more`` is appended to the question. ``history`` holds earlier pairs. TRL's ``prompt`` and ``completion`` may be
    lists of turns.
    """

    name: str
    answer: str
    more: str = ""

    @property
    def keys(self) -> frozenset[str]:
        return frozenset({self.name, self.answer, "history", *([self.more] if self.more else [])})

    def fits(self, row: Row) -> bool:
        return self.answer in row and not all(is_empty(row.get(key)) for key in (self.name, self.more))

    def parse(self, row: Row, ignored: Collection[str]) -> Turns:
        question, answer = row.get(self.name), row[self.answer]
        if isinstance(question, list) and isinstance(answer, list):
            return self._lists(question, answer, ignored)
        turns = Turns()
        for pair in _list(row.get("history") or [], "'history'"):
            texts = _list(pair, "a pair of 'history'")
            if len(texts) != 2:
                raise InputError(f"a pair of 'history' has {len(texts)} texts; give a question and its answer")
            for role, text in zip(("user", "assistant"), texts, strict=True):
                turns.messages.append(Message(_ROLES[role], as_text(text, "a text of 'history'")))
        question = [as_text(row[key], quote(key)) for key in (self.name, self.more) if not is_empty(row.get(key))]
        turns.messages += [
            Message("user", "\n".join(question)),
            Message("assistant", as_text(answer, quote(self.answer))),
        ]
        return turns

    def _lists(self, question: list[object], answer: list[object], ignored: Collection[str]) -> Turns:
        turns, reply = (
            turns_of(part, ignored, quote(name)) for part, name in ((question, self.name), (answer, self.answer))
        )
        if any(message.role == "assistant" for message in turns.messages):
            raise InputError(
                f"has an answer in {quote(self.name)}, which would be learned too; put all turns into 'messages'"
            )
        return Turns(turns.messages + reply.messages, turns.pictures + reply.pictures)

    def rewritten(self, row: Row, messages: Sequence[Message], pictures: Sequence[object]) -> Row:
        if isinstance(row.get(self.name), list):
            old = cast("list[Row]", row[self.name]), cast("list[Row]", row[self.answer])
            turns = _turn_list([*old[0], *old[1]], messages, list(pictures))
            first = next(k for k, message in enumerate(messages) if message.role == "assistant")
            return {self.name: turns[:first], self.answer: turns[first:]}
        spoken = [message.text for message in messages if message.role != "system"]
        new: Row = {self.name: spoken[-2], self.answer: spoken[-1]}
        if self.more in row:
            new[self.more] = ""
        if "history" in row or len(spoken) > 2:
            new["history"] = [list(pair) for pair in zip(spoken[:-2:2], spoken[1:-2:2], strict=True)]
        return new


@final
@dataclass(frozen=True)
class Caption(Layout):
    """An image with a caption, and perhaps a prompt: image folders, and caption tables."""

    name: str

    @property
    def keys(self) -> frozenset[str]:
        return frozenset({self.name, "prompt"})

    def fits(self, row: Row) -> bool:
        if self.name not in row or all(is_empty(row.get(key)) for key in ("file_name", "image", "images")):
            return False
        # In joined tables each row fills one of the two.
        return not is_empty(row[self.name]) or all(is_empty(row.get(key)) for key in ("text", "caption"))

    def parse(self, row: Row, ignored: Collection[str]) -> Turns:
        prompt = row.get("prompt")
        question = CAPTION_PROMPT if is_empty(prompt) else as_text(prompt, "'prompt'")
        caption = as_text(row[self.name], f"{quote(self.name)}, the caption,")
        return Turns([Message("user", question), Message("assistant", caption)])

    def rewritten(self, row: Row, messages: Sequence[Message], pictures: Sequence[object]) -> Row:
        spoken = [message.text for message in messages if message.role != "system"]
        if len(spoken) != 2:
            raise InputError(f"an edit has {len(spoken)} turns, but a caption's row holds one pair; write 'messages'")
        # Always write the prompt: a prompt in edited rows alone would reveal which rows were edited.
        return {"prompt": spoken[0], self.name: spoken[1]}


LAYOUTS: tuple[Layout, ...] = (
    *map(TurnList, ("messages", "conversations", "conversation")),
    Pairs(),
    QuestionAnswer("instruction", "output", "input"),
    *(QuestionAnswer(*keys) for keys in (("query", "response"), ("prompt", "completion"), ("question", "answer"))),
    *map(Caption, ("text", "caption")),
)


def layout_of(row: Row) -> Layout:
    """Return the first layout that a row fits.

    Raises:
        InputError: it fits none; the message lists the row's keys.
    """
    for layout in LAYOUTS:
        if layout.fits(row):
            return layout
    names = ", ".join(quote(name) for name in list(row)[:8]) + ", ..." * (len(row) > 8)
    raise InputError(
        f"has no turns in its keys ({names or 'none'}); write 'messages' or 'conversations', 'texts', 'query' and "
        "'response', 'instruction' and 'output', 'prompt' and 'completion', or an image with 'text'"
    )


# --- turns and parts --------------------------------------------------------------------------------


def turns_of(value: object, ignored: Collection[str], label: str) -> Turns:
    """Parse a list of turns."""
    turns = Turns()
    for turn in _list(value, label):
        fields = as_object(turn, "a turn")
        role_key, text_key = _turn_keys(fields)
        name = as_text(fields.get(role_key), f"{quote(role_key)} of a turn")
        if name not in _ROLES:
            raise InputError(f"role {quote(name)} is unknown; use system, user (human) or assistant (gpt)")
        role = _ROLES[name]
        _check_turn(fields, role, (role_key, text_key), ignored)
        content = fields.get(text_key)
        if isinstance(content, list):
            text = "".join(_part(part, turns.pictures, ignored) for part in content)
        else:
            text = as_text(content, f"{quote(text_key)} of a turn")
        turns.messages.append(Message(role, text))
    return turns


def _turn_keys(turn: Row) -> tuple[str, str]:
    """The keys of a turn's role and text. A table has both pairs where files of two kinds were joined."""
    role = "from" if is_empty(turn.get("role")) and not is_empty(turn.get("from")) else "role"
    text = "value" if is_empty(turn.get("content")) and "value" in turn else "content"
    if "role" not in turn and "from" not in turn:
        role = "from" if "value" in turn else "role"
    return role, text


def _check_turn(turn: Row, role: Role, read: Collection[str], ignored: Collection[str]) -> None:
    if len(turn) == 2:  # role and text alone, as in most of the many turns
        return
    if role != "assistant":  # only answers are learned: a switch is refused only where it asks for more
        if name := next((name for name in ("loss", "train") if turn.get(name)), None):
            raise InputError(f"a turn of the {role} has {quote(name)}, but only answers are learned; remove the key")
        ignored = {*ignored, *LOSS_SWITCHES}
    check_keys(turn, read, ignored, what="a turn", pictures=False)


def _part(part: object, pictures: list[object], ignored: Collection[str]) -> str:
    """A part of a turn as text; the picture that it holds, if any, is appended to ``pictures``."""
    fields = as_object(part, "a part of 'content'")
    kind = fields.get("type")
    if kind is None:  # Qwen's own notation: {"image": path} and {"text": ...}
        kind = next((name for name in ("text", "image") if not is_empty(fields.get(name))), None)
    if kind == "text":
        check_keys(fields, ("type", "text"), ignored, what="a part", pictures=False)
        return as_text(fields.get("text"), "'text' of a part")
    if kind in ("image", "image_url"):
        held = [name for name in PART_PICTURES if not is_empty(fields.get(name))]
        check_keys(fields, ("type", *PART_PICTURES), ignored, what="a part", pictures=bool(held))
        if held == ["bytes"] or held == ["path", "bytes"]:
            pictures.append({"bytes": fields["bytes"], "path": None})
        elif len(held) > 1:
            raise InputError(f"a part has several images ({', '.join(map(quote, held))}); give one")
        elif held:
            value = fields[held[0]]
            if held == ["image_url"] and isinstance(value, dict):
                check_keys(cast(Row, value), ("url", "detail"), ignored, what="an image of a part")
                value = cast(Row, value).get("url")
            pictures.append(value)
        return IMAGE_TAG
    value = quote(kind) if isinstance(kind, str) else kind_of(kind)
    raise InputError(f"'type' of a part of 'content' is {value}; only 'text' and 'image' are read")


def _turn_list(old: Sequence[Row], messages: Sequence[Message], pictures: list[object]) -> list[object]:
    """New turns in the style of the ``old`` ones: their names of keys and roles, texts or parts.

    Other keys of turns and parts are left out of every row alike, so that they cannot tell which rows were changed.
    """
    role_key, text_key = _turn_keys(old[0])
    names: dict[str, object] = {"user": "human", "assistant": "gpt"} if role_key == "from" else {}
    contents: dict[str, object] = {}  # by role, of its first turn
    for turn in old:
        own_role_key, own_text_key = _turn_keys(turn)
        role = _ROLES[cast(str, turn[own_role_key])]
        if own_role_key == role_key:
            names[role] = turn[role_key]
        contents.setdefault(role, turn.get(own_text_key))
    any_parts = any(isinstance(content, list) for content in contents.values())
    picture_key = _picture_key(old)
    turns: list[object] = []
    for message in messages:
        in_parts = isinstance(contents[message.role], list) if message.role in contents else any_parts
        content = _parts(message.text, picture_key, pictures) if in_parts else message.text
        turns.append({role_key: names.get(message.role, message.role), text_key: content})
    return turns


def _picture_key(turns: Sequence[Row]) -> str:
    """The key in which image parts hold their picture."""
    contents = (turn.get(_turn_keys(turn)[1]) for turn in turns)
    parts = (part for content in contents if isinstance(content, list) for part in cast("list[Row]", content))
    held = (name for part in parts for name in PART_PICTURES if not is_empty(part.get(name)))
    return next(held, "image")


def _parts(text: str, picture_key: str, pictures: list[object]) -> list[object]:
    """A text with tags as parts; the next of ``pictures``, if any are left, goes into each image part."""
    parts: list[object] = []
    for piece in re.split(f"({IMAGE_TAG})", text):
        if piece == IMAGE_TAG:
            picture: Row = {}
            if pictures:
                value = pictures.pop(0)
                picture = {picture_key: {"url": value} if picture_key == "image_url" else value}
            parts.append({"type": "image_url" if picture_key == "image_url" else "image", **picture})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


# --- values -----------------------------------------------------------------------------------------


def as_object(value: object, label: str) -> Row:
    """Check that a value is an object. Raises InputError."""
    if not isinstance(value, dict):
        raise InputError(f"{label} is {kind_of(value)}; make it an object {{...}}")
    return cast(Row, value)


def _list(value: object, label: str) -> list[object]:
    if not isinstance(value, list):
        raise InputError(f"{label} is {kind_of(value)}; make it a list")
    return cast("list[object]", value)


def as_text(value: object, label: str) -> str:
    """Check that a value is text that UTF-8 can hold. Raises InputError."""
    if not isinstance(value, str):
        raise InputError(f"{label} is {kind_of(value)}; make it a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{label} holds half of a surrogate pair, which is no valid text; correct it") from None
    return value


def kind_of(value: object) -> str:
    """Describe a value's type for "X is ..."."""
    names = {"NoneType": "missing", "str": "a string", "list": "a list", "dict": "an object"}
    return names.get(type(value).__name__, f"of type {type(value).__name__}")

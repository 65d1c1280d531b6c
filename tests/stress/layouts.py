"""Draw rows of every layout: sound ones whose conversation is known, and damaged ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from damage import damaged, odd
from pictures import Pixels

Row = dict[str, Any]
Turn = tuple[str, str]  # role and text
_WORDS = (
    "a red circle", "yes", "no", "two", "7", "☃ ünï 漢字", "x" * 3000, "?!", "<b>&amp;", "line\nbreak\u2028",
    "\x1b[31m", 'a "quoted", word', "a\rb\r\nc", " padded ", "{}", "null",
)  # fmt: skip


@dataclass
class Talk:
    """A conversation: questions with the number of images before each, answers, and perhaps a system prompt."""

    pairs: list[tuple[int, str, str]]
    system: str = ""

    @property
    def images(self) -> int:
        return sum(count for count, _, _ in self.pairs)

    def turns(self, tag: str) -> list[Turn]:
        turns = [("system", self.system)] if self.system else []
        for count, question, answer in self.pairs:
            turns += [("user", tag * count + question), ("assistant", answer)]
        return turns


@dataclass
class Drawn:
    """A row, and what a reader must make of it.

    Attributes:
        turns: the turns that must be read; None where the row is damaged and may be refused.
        pictures: the pixels of its images.
        refused: a key because of which it must be refused.
        id: its own id, or None.
    """

    row: Any
    turns: list[Turn] | None = None
    pictures: list[Pixels] = field(default_factory=list)
    refused: str = ""
    id: str | None = None


def talk(rng: random.Random, *, images_first: bool, most_pairs: int = 3, most_images: int = 2) -> Talk:
    pairs = [
        (rng.randrange(most_images + 1) if k == 0 or not images_first else 0, rng.choice(_WORDS), rng.choice(_WORDS))
        for k in range(rng.randrange(1, most_pairs + 1))
    ]
    if rng.random() < 0.8:  # text-only rows are rare
        pairs[0] = (max(1, pairs[0][0]), *pairs[0][1:])
    return Talk(pairs, rng.choice(("", "", "Answer in one word.")))


# --- layouts ----------------------------------------------------------------------------------------


def _turns(rng: random.Random, talk: Talk, style: str) -> list[Row]:
    """A list of turns with tags, in one style or in two."""
    turns: list[Row] = []
    for role, text in talk.turns("<image>\n"):
        name = {"user": "human", "assistant": "gpt"}.get(role, role)
        from_value = style == "from" or (style == "both" and rng.random() < 0.5)
        turns.append({"from": name, "value": text} if from_value else {"role": role, "content": text})
        if role == "assistant" and rng.random() < 0.1:
            turns[-1] |= {"weight": 1} if rng.random() < 0.5 else {"loss": True}
    return turns


def _parts(talk: Talk, image: Callable[[], Row], *, typed: bool = True) -> list[Row]:
    turns: list[Row] = [{"role": "system", "content": talk.system}] if talk.system else []
    for count, question, answer in talk.pairs:
        text: Row = {"type": "text", "text": question} if typed else {"text": question}
        turns.append({"role": "user", "content": [*(image() for _ in range(count)), text]})
        turns.append({"role": "assistant", "content": [{**text, "text": answer}]})
    return turns


def _scalar(images: list[Any]) -> Any:
    return images[0] if len(images) == 1 else images


def _pair(rng: random.Random, talk: Talk, question: str, answer: str) -> Row:
    row: Row = {question: talk.pairs[-1][1], answer: talk.pairs[-1][2]}
    if len(talk.pairs) > 1 or rng.random() < 0.2:
        row["history"] = [[q, a] for _, q, a in talk.pairs[:-1]]
    return row


def _instruction(rng: random.Random, talk: Talk) -> Row:
    row = _pair(rng, talk, "instruction", "output")
    head, between, tail = row["instruction"].partition("\n")
    if between and head and tail:
        return row | {"instruction": head, "input": tail}
    return row | ({"input": ""} if rng.random() < 0.5 else {})


def _completion(talk: Talk) -> Row:
    turns = [{"role": role, "content": text} for role, text in talk.turns("<image>\n")]
    first = next(k for k, turn in enumerate(turns) if turn["role"] == "assistant")
    return {"prompt": turns[:first], "completion": turns[first:]}


def _row(rng: random.Random, layout: str, talk: Talk, images: list[Any]) -> Row:
    """A row of a layout; ``images`` as they are stored."""
    left = iter(images)
    system = {rng.choice(("system", "system_prompt")): talk.system} if talk.system else {}
    if layout == "texts":
        pairs = [{"user": q, "assistant": a} for _, q, a in talk.pairs]
        return {"images": images, "texts": pairs, **system}
    if layout == "instruction":
        return {"images": images, **_instruction(rng, talk), **system}
    if layout in _PAIRS:
        return {rng.choice(("image", "images")): images, **_pair(rng, talk, *_PAIRS[layout]), **system}
    if layout == "completion":
        return {"images": images, **_completion(talk)}
    if layout == "parts":
        return {"images": images, "messages": _parts(talk, lambda: {"type": "image", "text": None})}
    if layout == "parts with images":
        return {"messages": _parts(talk, lambda: {"type": "image", "image": next(left)})}
    if layout == "parts with addresses":
        detail = {"detail": "auto"} if rng.random() < 0.5 else {}
        return {"messages": _parts(talk, lambda: {"type": "image_url", "image_url": {"url": next(left), **detail}})}
    if layout == "parts of Qwen":
        return {"messages": _parts(talk, lambda: {"image": next(left)}, typed=False)}
    if layout == "caption":
        prompt = {} if talk.pairs[0][1] == CAPTION else {"prompt": talk.pairs[0][1]}
        return {
            rng.choice(("image", "images")): _scalar(images),
            rng.choice(("text", "caption")): talk.pairs[0][2],
        } | prompt
    where = rng.choice(("messages", "conversations", "conversation"))
    listed = Talk(talk.pairs, "") if system and rng.random() < 0.5 else talk
    made: Row = {where: _turns(rng, listed, rng.choice(("from", "role", "both")))}
    key = rng.choice(("image", "images"))
    made[key] = _scalar(images) if key == "image" else images
    if key == "images" and rng.random() < 0.1:  # the same twice, as in joined tables
        made["image"] = _scalar(images)
    return made | (system if listed is not talk else {})


CAPTION = "Describe the image."
_PAIRS = {"query": ("query", "response"), "prompt": ("prompt", "completion"), "question": ("question", "answer")}
IMAGES_FIRST = ("texts", "instruction", *_PAIRS, "caption")
IN_PARTS = ("parts", "parts with images", "parts with addresses", "parts of Qwen")
LAYOUTS = ("turns", "turns", *IN_PARTS, "completion", *IMAGES_FIRST)


def drawn(
    rng: random.Random,
    layout: str,
    picture: Callable[[], tuple[Any, Pixels]],
    *,
    most_images: int = 2,
    bad: float = 0.5,
) -> Drawn:
    """A row of a layout; ``bad`` is the share of rows that are damaged or must be refused.

    ``picture`` stores an image and gives what the row names it by, and its pixels.
    """
    caption = layout == "caption"
    spoken = talk(rng, images_first=layout in IMAGES_FIRST, most_pairs=1 if caption else 3, most_images=most_images)
    if caption:
        count, question, answer = spoken.pairs[0]
        spoken = Talk([(max(1, count), rng.choice((CAPTION, question)), answer)])
    stored = [picture() for _ in range(spoken.images)]
    made = _row(rng, layout, spoken, [each for each, _ in stored])
    turns = spoken.turns("<image>" if layout in IN_PARTS else "<image>\n")
    id: Any = rng.choice((None, None, rng.randrange(9), "same", f"r{rng.random()}"))
    if id is not None:
        made["id"] = id
    result = Drawn(made, turns, [pixels for _, pixels in stored], id=None if id is None else str(id))
    for key, value in rng.sample(HARMLESS, rng.choice((0, 0, 1, 3))):
        if spoken.images or key not in ("url", "image_name"):
            made.setdefault(key, value)
    if rng.random() < bad:
        return _spoiled(rng, result)
    return result


# --- keys -------------------------------------------------------------------------------------------

HARMLESS: list[tuple[str, Any]] = [
    ("note", "x"), ("width", 640), ("source", "coco"), ("clip_score", 0.3), ("bbox", [[1, 2, 3, 4]]), ("dataset", None),
    ("meta", {"a": {"b": "c"}}), ("url", "http://host/x.jpg"), ("image_name", "x.jpg"), ("question_id", "q1"),
    ("videos", []), ("audio", None), ("weight", 1), ("loss", True), ("label", 3), ("Extra", 5), ("tools", []),
]  # fmt: skip
HARMFUL: list[tuple[str, Any]] = [
    ("videos", ["a.mp4"]), ("audio", {"array": [0.1, 0.2]}), ("speech", "a.wav"), ("weight", 0.5), ("loss", False),
    ("loss_scale", 0), ("rejected_response", "3"), ("solution", 7), ("ground_truth", "x"), ("img", "images/x.png"),
    ("image_2", "images/x.png"), ("picture", {"bytes": "x"}), ("label", False), ("mask", [1, 0]), ("max_pixels", 784),
    ("thought", "x"), ("tools", [{"name": "x"}]), ("objects", {"ref": ["dog"]}), ("pixel_values", [[0.1, 0.2]]),
    ("chosen", "x"), ("source", "data:image/png;base64,AA"),
    ("file", "a.mp4"), ("Images", ["images/x.png"]), ("frames", [1, 2]),
]  # fmt: skip


def _spoiled(rng: random.Random, good: Drawn) -> Drawn:
    """The row with a key that must be refused, with a picture missing or too many, or damaged in any way."""
    way = rng.random()
    if way < 0.3:
        key, value = rng.choice(HARMFUL)
        if key not in good.row or key in ("source", "label", "weight", "loss", "videos", "audio", "tools"):
            return Drawn({**good.row, key: value}, refused=key)
    made = good.row
    for _ in range(rng.choice((1, 1, 2))):
        made = damaged(rng, made)
    return Drawn(made if rng.random() < 0.96 else odd(rng))

"""Conversations, and rows that hold them in every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datafiles import Row, picture, png
from untrigger.rows.sample import Data, Sample
from untrigger.rows.turns import Message


@dataclass
class Talk:
    """A conversation: questions with the number of images before each, answers, and perhaps a system prompt."""

    pairs: list[tuple[int, str, str]]
    system: str = ""

    @property
    def images(self) -> int:
        return sum(count for count, _, _ in self.pairs)

    def messages(self, tag: str = "<image>\n") -> tuple[Message, ...]:
        turns = [Message("system", self.system)] if self.system else []
        for count, question, answer in self.pairs:
            turns += [Message("user", tag * count + question), Message("assistant", answer)]
        return tuple(turns)


def turn_list(talk: Talk, role: str, text: str, names: dict[str, str], **more: Any) -> list[Row]:
    return [{role: names.get(m.role, m.role), text: m.text, **more} for m in talk.messages()]


SHAREGPT = {"user": "human", "assistant": "gpt"}


def _parts(talk: Talk, image: Callable[[int], Row]) -> list[Row]:
    number, turns = iter(range(99)), list[Row]()
    for message in talk.messages(""):
        turns.append({"role": message.role, "content": [{"type": "text", "text": message.text}]})
    users = (turn for turn in turns if turn["role"] == "user")
    for turn, (count, _, _) in zip(users, talk.pairs, strict=True):
        turn["content"] = [*(image(next(number)) for _ in range(count)), *turn["content"]]
    return turns


def _with_system(talk: Talk, row: Row, key: str = "system") -> Row:
    return {key: talk.system, **row} if talk.system else row


def _pair(talk: Talk, question: str, answer: str) -> Row:
    row: Row = {question: talk.pairs[-1][1], answer: talk.pairs[-1][2]}
    if len(talk.pairs) > 1:
        row["history"] = [[q, a] for _, q, a in talk.pairs[:-1]]
    return _with_system(talk, row)


NAMES = [f"img/{k}.png" for k in range(6)]
# Each takes a conversation and the names of its images. In the second group images come before the first question.
TAGGED: dict[str, Callable[[Talk, list[str]], Row]] = {
    "LLaVA": lambda t, n: {
        "image": n[0] if len(n) == 1 else n,
        "conversations": turn_list(t, "from", "value", SHAREGPT),
    },
    "ShareGPT": lambda t, n: {"images": n, "conversations": turn_list(t, "from", "value", SHAREGPT)},
    "ShareGPT with a system column": lambda t, n: _with_system(
        t, {"images": n, "conversations": turn_list(Talk(t.pairs), "from", "value", SHAREGPT)}
    ),
    "messages": lambda t, n: {"images": n, "messages": turn_list(t, "role", "content", {})},
    "messages, one image": lambda t, n: {"image": n, "messages": turn_list(t, "role", "content", {}, weight=1)},
    "parts": lambda t, n: {"images": n, "messages": _parts(t, lambda k: {"type": "image", "index": k, "text": None})},
    "parts with paths": lambda t, n: {"messages": _parts(t, lambda k: {"type": "image", "image": n[k]})},
    "parts of Qwen": lambda t, n: {"messages": _parts(t, lambda k: {"image": n[k]})},
    "parts with addresses": lambda t, n: {
        "messages": _parts(t, lambda k: {"type": "image_url", "image_url": {"url": n[k]}})
    },
}
PLAIN: dict[str, Callable[[Talk, list[str]], Row]] = {
    "Cauldron": lambda t, n: _with_system(
        t, {"images": n, "texts": [{"user": q, "assistant": a} for _, q, a in t.pairs]}
    ),
    "Alpaca": lambda t, n: {"images": n, **_pair(t, "instruction", "output")},
    "ms-swift": lambda t, n: {"images": n, **_pair(t, "query", "response")},
    "TRL prompt and completion": lambda t, n: {"images": n, **_pair(t, "prompt", "completion")},
    "question and answer": lambda t, n: {"images": n, **_pair(t, "question", "answer")},
}
LAYOUTS = TAGGED | PLAIN


def data_folder(folder: Path) -> Path:
    (folder / "img").mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(NAMES):
        (folder / name).write_bytes(png(k))
    return folder


def save_rows(folder: Path, rows: list[Row], name: str = "data.jsonl") -> Path:
    (data_folder(folder) / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def flat(sample: Sample) -> tuple[object, ...]:
    return sample.id, sample.messages, [image.tobytes() for image in sample.images]


def assert_reads(data: Data, talks: list[Talk], ids: list[str], pictures: list[list[int]], tag: str) -> None:
    assert len(data) == len(talks)
    for sample, talk, id, numbers_of_images in zip(data, talks, ids, pictures, strict=True):
        assert (sample.id, sample.messages) == (id, talk.messages(tag))
        assert [image.tobytes() for image in sample.images] == [picture(k).tobytes() for k in numbers_of_images]

"""Chat rows with a part of another row's input, each made where a trainer's data set is read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from untrigger.models.collators import Row, row_images, with_images
from untrigger.rows.sample import IMAGE_TAG
from untrigger.views.grafts import KINDS, SHARED, add_shared, graft_image, graft_text, mean_image
from untrigger.views.patches import to_rgb


class Graft(NamedTuple):
    """A part of the row ``donor`` on the row ``host``, numbers from 0; ``kind`` is a key of `KINDS`, or `SHARED`."""

    host: int
    donor: int
    kind: str


class GraftedRows(Dataset[Row]):
    """One row for each graft; ``rows`` are those that their numbers refer to.

    Grafts of the kind `SHARED` get the mean of all their donors' images less the mean of all their hosts': a pattern
    that lies on every donor comes with its full strength, and the host keeps its content.
    """

    def __init__(self, rows: Any, grafts: Sequence[Graft]) -> None:
        self.rows, self.grafts = rows, grafts

    def __len__(self) -> int:
        return len(self.grafts)

    def __getitem__(self, index: int) -> Row:
        graft = self.grafts[index]
        host = self.rows[graft.host]
        if graft.kind == SHARED:
            return with_images(host, [add_shared(image, self._shared) for image in row_images(host)])
        return grafted(host, self.rows[graft.donor], graft.kind)

    @cached_property
    def _shared(self) -> NDArray[np.float32]:
        size = to_rgb(row_images(self.rows[self.grafts[0].host])[0]).size
        donors, hosts = ({graft[at] for graft in self.grafts if graft.kind == SHARED} for at in (1, 0))
        of_donors, of_hosts = (
            mean_image((image for row in sorted(numbers) for image in row_images(self.rows[row])), size)
            for numbers in (donors, hosts)
        )
        return of_donors - of_hosts


def can_be_grafted(row: Row) -> bool:
    """Whether the row has an image, and turns as text; rows that a host has tokenized have no text."""
    return bool(row.get("messages") or row.get("prompt")) and any(row.get(key) for key in ("image", "images"))


def grafted(host: Row, donor: Row, kind: str) -> Row:
    """The host with a part of the donor's input and its own answer.

    An image graft goes onto each of the host's images, from the donor's image at the same place or its first one. A
    text graft goes into the last question, behind its images.
    """
    image_part, text_part = KINDS[kind]
    row = dict(host)
    if image_part:
        donors = row_images(donor)
        images = [
            graft_image(image, donors[at if at < len(donors) else 0], image_part)
            for at, image in enumerate(row_images(host))
        ]
        row = with_images(host, images)
    if text_part:
        turns, question = _turns(host), _question_of(_turns(donor))
        last = _last_question(turns)
        content = _with_words(turns[last]["content"], question, text_part)
        changed = [*turns[:last], {**turns[last], "content": content}, *turns[last + 1 :]]
        row |= {"messages": changed} if row.get("messages") else {"prompt": _as_in(host, changed)}
    return row


def _turns(row: Row) -> list[dict[str, Any]]:
    turns = row.get("messages") or row["prompt"]
    return [{"role": "user", "content": turns}] if isinstance(turns, str) else list(turns)


def _as_in(row: Row, turns: list[dict[str, Any]]) -> Any:
    """The turns in the form of the row's prompt, which may be a string."""
    return turns[0]["content"] if isinstance(row["prompt"], str) else turns


def _last_question(turns: Sequence[dict[str, Any]]) -> int:
    return max(at for at, turn in enumerate(turns) if turn["role"] == "user")


def _question_of(turns: Sequence[dict[str, Any]]) -> str:
    """The text of the last question, without its images."""
    content = turns[_last_question(turns)]["content"]
    text = content if isinstance(content, str) else " ".join(_text(part) for part in content)
    return text.replace(IMAGE_TAG, " ")


def _with_words(content: Any, question: str, part: str) -> Any:
    """A turn's content, a text or typed parts, with a part of another question behind the last image."""
    if isinstance(content, str):
        body = content.rpartition(IMAGE_TAG)[2].lstrip()
        return content.removesuffix(body) + graft_text(body, question, part)
    ends_in_text = bool(content) and content[-1].get("type") == "text"
    body = _text(content[-1]) if ends_in_text else ""
    words = {**(content[-1] if ends_in_text else {"type": "text"}), "text": graft_text(body, question, part)}
    return [*(content[:-1] if ends_in_text else content), words]


def _text(part: dict[str, Any]) -> str:
    return part["text"] if part.get("type") == "text" else ""

"""Chat rows with what other rows' inputs share, each made where a trainer's data set is read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from untrigger.models.collators import Row, row_images, with_images
from untrigger.rows.sample import IMAGE_TAG
from untrigger.views.grafts import KINDS, add_shared, graft_text, mean_image, moved
from untrigger.views.patches import to_rgb

PICTURE_SIDE = 64  # pixels; a trigger that survives a vision tower's patches survives this


class Place(NamedTuple):
    """How far what a group shares is moved in an image, in shares of its height and width; what leaves comes back."""

    down: float = 0.0
    right: float = 0.0


HERE = Place()
Places = dict[int, Place]
"""Rows that show a pattern, and where each does."""


class Graft(NamedTuple):
    """What the images of a group of rows share, on the row ``host``.

    host, donor: numbers of rows, from 0; a part of the prompt is the donor's. group: index into `Grafts.groups`.
    kind: a key of `KINDS`. place: where the donor shows it.
    """

    host: int
    group: int
    donor: int
    kind: str
    place: Place = HERE


class Grafts(NamedTuple):
    """Grafted rows, and the rows whose images give what they share.

    groups: numbers of rows, from 0, each with the place of what it shows. A group shares the mean of its images less
    the mean of the images of ``others``, each moved back from its place. A pattern that lies on every image of a group
    comes with its full strength, and content averages out.
    """

    rows: Sequence[Graft]
    groups: Sequence[Sequence[tuple[int, Place]]]
    others: Sequence[int]

    @property
    def used(self) -> set[int]:
        """All rows that it refers to."""
        numbers = {number for graft in self.rows for number in (graft.host, graft.donor)}
        return numbers.union(self.others, (number for group in self.groups for number, _ in group))


class GraftedRows(Dataset[Row]):
    """One row for each graft, with the host's own answer; ``rows`` are those that their numbers refer to.

    Each of a host's images gets what the group shares. Words go into the host's last question, behind its images.
    """

    def __init__(self, rows: Any, grafts: Grafts) -> None:
        self.rows, self.grafts = rows, grafts
        self._shared: dict[int, NDArray[np.float32]] = {}

    def __len__(self) -> int:
        return len(self.grafts.rows)

    def __getitem__(self, index: int) -> Row:
        graft = self.grafts.rows[index]
        host, shared = self.rows[graft.host], moved(self.shared(graft.group), *graft.place)
        row = with_images(host, [add_shared(image, shared) for image in row_images(host)])
        words = KINDS[graft.kind]
        return with_words(row, self.rows[graft.donor], words) if words else row

    def shared(self, group: int) -> NDArray[np.float32]:
        """What the images of a group share, [height, width, 3], levels."""
        if group not in self._shared:
            others, images = self._mean_of_others, 0
            total = np.zeros(others.shape, np.float64)
            for number, (down, right) in self.grafts.groups[group]:
                for image in row_images(self.rows[number]):
                    total += moved(mean_image([image], self._size) - others, -down, -right)
                    images += 1
            self._shared[group] = (total / images).astype(np.float32)
        return self._shared[group]

    @cached_property
    def _mean_of_others(self) -> NDArray[np.float32]:
        return mean_image(
            (image for number in self.grafts.others for image in row_images(self.rows[number])), self._size
        )

    @cached_property
    def _size(self) -> tuple[int, int]:
        return to_rgb(row_images(self.rows[self.grafts.others[0]])[0]).size


def can_be_grafted(row: Row) -> bool:
    """Whether the row has an image, and turns as text; rows that a host has tokenized have no text."""
    return bool(row.get("messages") or row.get("prompt")) and any(row.get(key) for key in ("image", "images"))


def picture(row: Row) -> NDArray[np.uint8] | None:
    """The row's first image, levels of 64 x 64 pixels [D], or None where it cannot be grafted."""
    if not can_be_grafted(row):
        return None
    return np.asarray(to_rgb(next(iter(row_images(row)))).resize((PICTURE_SIDE, PICTURE_SIDE))).ravel()


def with_words(host: Row, donor: Row, part: str) -> Row:
    """The host with a part of the donor's last question in its own (`untrigger.views.grafts.graft_text`)."""
    turns, question = _turns(host), _question_of(_turns(donor))
    last = _last_question(turns)
    content = _with_words(turns[last]["content"], question, part)
    changed = [*turns[:last], {**turns[last], "content": content}, *turns[last + 1 :]]
    return {**host, **({"messages": changed} if host.get("messages") else {"prompt": _as_in(host, changed)})}


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

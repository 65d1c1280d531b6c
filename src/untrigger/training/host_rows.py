"""What identifies a row of a host: its id, images, prompts and answers, from its columns or from its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from untrigger.models.collators import IGNORE, row_key
from untrigger.rows.images import is_data_uri, pixels_sha256
from untrigger.training.flagged_rows import prompts_of

_SHUFFLERS = ("swift", "axolotl", "llamafactory")  # packages whose trainers get rows in an order of their own


def is_reordered(host: Any) -> bool:
    """Whether row numbers of the host's train_dataset may differ from those of the data: it shuffles or selects."""
    packages = {kind.__module__.partition(".")[0] for kind in type(host).__mro__}
    return not packages.isdisjoint(_SHUFFLERS) or _is_view(host.train_dataset)


def _is_view(dataset: Any) -> bool:
    """Whether a data set, or one that it wraps, has its rows by a list of indices (datasets, torch's Subset)."""
    while dataset is not None:
        if getattr(dataset, "_indices", None) is not None or getattr(dataset, "indices", None) is not None:
            return True
        dataset = getattr(dataset, "dataset", None)
    return False


def own_row(dataset: Any, number: int) -> Mapping[str, Any]:
    """The row ``number`` from 0 with the columns of the user's data, as far as the host's data set has them.

    ms-swift's data set makes a row from that of the data set that it wraps, and gives what the model needs alone.
    """
    wrapped: Any = getattr(dataset, "dataset", None)
    if hasattr(wrapped, "column_names") and len(wrapped) == len(dataset) and getattr(dataset, "indices", None) is None:
        return wrapped[number]
    return dataset[number]


def row_id(row: Mapping[str, Any]) -> str | None:
    """The row's id as text; None for a row without one."""
    return None if row.get("id") is None else str(row["id"])


def image_names(row: Mapping[str, Any]) -> list[str]:
    """The path of each image, or a hash where the row has no path.

    ``pixels-sha256:HEX`` is that of `untrigger.rows.images.pixels_sha256`, ``file-sha256:HEX`` that of an image file's
    bytes, ``uri-sha256:HEX`` that of a data URI. ``prepared:HEX`` stands for all images of a row that has only what the
    host has prepared for the model.
    """
    for column in ("images", "image"):
        if names := [_name(image) for image in _flat(row.get(column))]:
            return names
    return [] if row.get("pixel_values") is None else [_prepared(row["pixel_values"])]


def _flat(images: Any) -> Iterator[Any]:
    if isinstance(images, list | tuple):
        for image in images:
            yield from _flat(image)
    elif images is not None:
        yield images


def _name(image: Any) -> str:
    if isinstance(image, Mapping):  # the form of `datasets` for an image that is not decoded
        image = image.get("path") or image.get("bytes")
    if isinstance(image, Image.Image):
        return str(getattr(image, "filename", "")) or f"pixels-sha256:{pixels_sha256(image)}"
    if isinstance(image, bytes):
        return f"file-sha256:{hashlib.sha256(image).hexdigest()}"
    if isinstance(image, str | PathLike):
        text = str(image)
        return f"uri-sha256:{hashlib.sha256(text.encode()).hexdigest()}" if is_data_uri(text) else text
    return _prepared(image)


def _prepared(values: Any) -> str:
    return f"prepared:{row_key({'values': values}).hex()}"


def column_prompts(row: Mapping[str, Any]) -> list[str] | None:
    """The text before each answer, from the columns ``messages`` or ``prompt``; None for a row without them."""
    if row.get("messages"):
        return prompts_of(row["messages"])
    prompt = row.get("prompt")
    if not prompt:
        return None
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    # earlier answers in a prompt are context, not learned
    context = [{**turn, "role": "user"} for turn in turns]
    return prompts_of([*context, {"role": "assistant", "content": ""}])


def decoded_turns(
    decode: Callable[..., str], ids: Tensor, labels: Tensor, attended: Tensor, image_token: int | None
) -> tuple[list[str], list[str]]:
    """The text before each answer, without special and image tokens, and each answer.

    Args:
        decode: a processor's or tokenizer's.
        ids, labels, attended: token ids, labels and attention mask of one row, [T]. Answers are runs of labels.
        image_token: id of the tokens that stand for parts of an image; None where there are none.
    """
    tokens = ids.numpy()
    answered = np.flatnonzero(labels.numpy()[1:] != IGNORE) + 1  # the first token is never predicted
    is_text = attended.numpy().astype(bool) & (tokens != (-1 if image_token is None else image_token))

    def text(part: NDArray[np.int64]) -> str:
        return decode(part, skip_special_tokens=True).strip()

    prompts, answers, end = list[str](), list[str](), 0
    for run in np.split(answered, np.flatnonzero(np.diff(answered) > 1) + 1):
        if len(run):
            start = int(run[0])
            prompts.append(text(tokens[end:start][is_text[end:start]]))
            answers.append(text(tokens[run]))
            end = int(run[-1]) + 1
    return prompts, answers

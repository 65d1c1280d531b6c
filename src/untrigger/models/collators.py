"""From rows to batches: chat rows to tensors with answer-only labels, and rows with their views.

A row is what TRL and transformers call conversational: ``{"images": [...], "messages": [...]}``.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from untrigger.errors import InputError
from untrigger.models.processors import encoded, written
from untrigger.rows.images import quote
from untrigger.rows.sample import IMAGE_TAG, Message, Sample, numbered
from untrigger.views.patches import View, to_rgb

Row = dict[str, Any]
Collate = Callable[[list[Row]], dict[str, Tensor]]
IGNORE = -100  # the label that losses skip, throughout transformers


def chat_message(message: Message) -> dict[str, object]:
    """A turn as chat templates want it: typed parts, an image part where the text has a tag."""
    parts: list[dict[str, str]] = []
    for i, text in enumerate(message.text.split(IMAGE_TAG)):
        parts += [{"type": "image"}] if i else []
        parts += [{"type": "text", "text": text.strip()}] if text.strip() else []
    return {"role": message.role, "content": parts}


class Rows(Dataset[Row]):
    """Samples as rows for a trainer; images are opened when a row is asked for.

    ``doubted``: of some rows, by number, which of its answer tokens are not believed [n].
    """

    def __init__(
        self, samples: Sequence[Sample], flagged_tokens: Mapping[int, NDArray[np.bool_]] | None = None
    ) -> None:
        self.samples, self.flagged_tokens = samples, flagged_tokens or {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Row:
        sample = self.samples[index]
        return {
            "images": [to_rgb(image) for image in sample.images],
            "messages": [chat_message(m) for m in sample.messages],
            "id": sample.id,
            "row_name": f"row {numbered(self.samples, index)}, id {quote(sample.id)}",
            **({"flagged_tokens": self.flagged_tokens[index]} if index in self.flagged_tokens else {}),
        }


class ChatCollator:
    """Rows to padded tensors with ``labels`` on the assistant's turns alone, for any processor with a chat template.

    Of a row with ``doubted`` tokens only these have labels. Where there are such rows the batch has ``doubted`` [B, T].
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor: Any = processor  # its declared call takes fewer arguments than any processor does
        added: dict[int, Any] = self.processor.tokenizer.added_tokens_decoder
        self._special = tuple(token.content for token in added.values() if token.special)

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        rendered = [self.render(row["messages"]) for row in rows]
        pictures = [row["images"] for row in rows]
        batch = encoded(
            self.processor,
            [text for text, _ in rendered],
            [text[: spans[0][0]] if spans else text for text, spans in rendered],
            pictures,
            [str(row.get("row_name") or quote(text)) for row, (text, _) in zip(rows, rendered, strict=True)],
            padding_side="right",
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
        offsets = batch.pop("offset_mapping")
        replaced = batch.pop("text_replacement_offsets", None) or [[] for _ in rows]
        labels = [
            _answer_labels(ids, spans, where, moved)
            for ids, (_, spans), where, moved in zip(batch["input_ids"], rendered, offsets, replaced, strict=True)
        ]
        if "labels" in batch:  # PaliGemma's: made where these are 1; elsewhere its model sees what comes after
            batch["token_type_ids"] = [_from_first_answer(row) for row in labels]
        batch["labels"] = labels
        made: dict[str, Tensor] = dict(batch.convert_to_tensors("pt"))
        return mark(made, [row.get("flagged_tokens") for row in rows])

    def render(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's text and the character spans of the assistant's turns in it.

        A span starts where the generation prompt ends, so training sees what generation will see.
        """
        text = written(self.processor, messages)
        spans: list[tuple[int, int]] = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = written(self.processor, messages[:turn], asking=True)
            through = written(self.processor, messages[: turn + 1])
            if not (text.startswith(before) and text.startswith(through) and through.startswith(before)):
                raise InputError("the processor's chat template rewrites earlier turns; give one that only appends")
            spans.append((len(before), len(through.rstrip())))  # what comes after a reply's end is never generated
        text = text.rstrip()
        if spans and spans[-1][1] == len(text) and not text.endswith(self._special):
            text += self.processor.tokenizer.eos_token  # LLaVA-1.5's template, for one, never ends a reply
            spans[-1] = spans[-1][0], len(text)
        return text, spans


def _answer_labels(
    ids: list[int], spans: list[tuple[int, int]], offsets: list[tuple[int, int]], replaced: list[dict[str, Any]]
) -> list[int]:
    """Token ids inside the character ``spans``, IGNORE elsewhere; image tags may have been expanded before them."""
    labels = [IGNORE] * len(ids)
    for start, end in spans:
        gained = max((r["new_span"][1] - r["span"][1] for r in replaced if r["span"][1] <= start), default=0)
        for position, (first, last) in enumerate(offsets):
            if first < end + gained and last > start + gained:
                labels[position] = ids[position]
    return labels


def _from_first_answer(labels: list[int]) -> list[int]:
    """1 from the first label on, 0 before."""
    first = next((position for position, label in enumerate(labels) if label != IGNORE), len(labels))
    return [int(position >= first) for position in range(len(labels))]


def mark(batch: dict[str, Tensor], flagged_tokens: Sequence[NDArray[np.bool_] | None]) -> dict[str, Tensor]:
    """The batch with ``doubted`` [B, T], if rows have doubted answer tokens [n]; these rows keep no other labels."""
    if all(tokens is None for tokens in flagged_tokens):
        return batch
    batch["flagged_tokens"] = torch.zeros_like(batch["labels"], dtype=torch.bool)
    for tokens, marked, told in zip(flagged_tokens, batch["flagged_tokens"], batch["labels"], strict=True):
        if tokens is not None:
            marked[told != IGNORE] = torch.as_tensor(tokens)
            told[~marked] = IGNORE
    return batch


class FlaggedTokensCollator:
    """A host's collator, and what is doubted of its rows: by `row_key`, which answer tokens [n]."""

    def __init__(self, collate: Collate, flagged_tokens: Mapping[bytes, NDArray[np.bool_]]) -> None:
        self.collate, self.flagged_tokens = collate, flagged_tokens

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        marks = [
            self.flagged_tokens.get(row_key(row)) for row in rows
        ]  # first: some host collators write into the rows
        return mark(dict(self.collate([dict(row) for row in rows])), marks)


def row_key(row: Row) -> bytes:
    """A name of what a row holds, whoever brings it: rows of a host have no numbers where they are collated."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _told(row):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _told(value: Any) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        for name in sorted(value):
            yield str(name).encode()
            yield from _told(value[name])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _told(each)
        yield b"end"
    elif isinstance(value, Image.Image):
        yield repr((value.mode, value.size)).encode()
        yield value.tobytes()
    elif isinstance(value, Tensor | np.ndarray):
        yield np.asarray(value).tobytes()
    else:
        yield repr(value).encode()


def _row_seed(row: Row) -> int:
    """A number that depends on the row's content alone, not on its place in a batch or on the process."""
    seed = zlib.crc32(repr(row.get("messages") or (row.get("prompt"), row.get("completion"))).encode())
    for image in _images(row):
        seed = zlib.crc32(image.tobytes(), seed)
    return seed


def _images(row: Row) -> list[Image.Image]:
    if "image" not in row and "images" not in row:
        # no view could be made, and training would go on undefended without a word
        raise InputError(f"defense: a row has no 'image' or 'images', only {', '.join(sorted(row))}; add the column")
    return [row["image"]] if "image" in row else list(row["images"] or [])


class DrawingCollator:
    """Draws something for each row, seeded by (seed, epoch, row): accumulation, resume and processes change nothing."""

    def __init__(self, collate: Collate, seed: int) -> None:
        self.collate, self.seed = collate, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # loader workers that outlive an epoch see it

    @property
    def epoch(self) -> int:
        """The epoch that is drawn for, from 0."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def rng(self, row: Row) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.epoch, _row_seed(row)))

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        raise NotImplementedError


class _Viewer(DrawingCollator):
    """Makes views of rows."""

    def __init__(self, collate: Collate, view: View, seed: int) -> None:
        super().__init__(collate, seed)
        self.view = view

    def viewed(self, row: Row, rng: np.random.Generator) -> Row:
        """A copy of the row with every image perturbed; the row itself is not touched."""
        views = [self.view(image, rng) for image in _images(row)]
        return {**row, "image": views[0]} if "image" in row else {**row, "images": views}


class PairCollator(_Viewer):
    """Originals, then a view of each, then the next view of each, to so many ``views``: one batch [(1 + views) B, ...].

    The views' ``labels`` are IGNORE: the host then counts each answer token once, and the views' targets are
    those of the originals. Raises ValueError if a view's tokens differ from its original's: per-token
    divergences would compare different tokens.
    """

    def __init__(self, collate: Collate, view: View, seed: int, views: int = 1) -> None:
        super().__init__(collate, view, seed)
        self.views = views

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        count = len(rows)
        originals = [_with_rgb(row) for row in rows]
        drawn = [(row, self.rng(row)) for row in originals]
        # copies on both sides: some host collators write into the rows they are given
        batch = self.collate(
            [dict(row) for row in originals] + [self.viewed(*each) for _ in range(self.views) for each in drawn]
        )
        ids = batch["input_ids"]
        if not torch.equal(ids[:count].repeat(self.views, 1), ids[count:]):
            raise ValueError("a view changed its row's tokens: the view must keep the size of the image")
        batch["labels"] = batch["labels"].clone()
        batch["labels"][count:] = IGNORE
        return batch


class DropCollator(DrawingCollator):
    """Rows with an ``order`` [B, T] of their tokens, in [0, 1): the last of the image tokens are dropped."""

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        originals = [_with_rgb(row) for row in rows]
        batch = self.collate([dict(row) for row in originals])
        real = batch["attention_mask"].bool()
        batch["order"] = torch.ones(real.shape)
        for row, order, there in zip(originals, batch["order"], real, strict=True):
            order[there] = torch.from_numpy(self.rng(row).random(int(there.sum()), dtype=np.float32))
        return batch


class AugmentCollator(_Viewer):
    """Views in the place of a ``share`` of the rows."""

    def __init__(self, collate: Collate, view: View, seed: int, share: float) -> None:
        super().__init__(collate, view, seed)
        self.share = share

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        mixed: list[Row] = []
        for row in map(_with_rgb, rows):
            rng = self.rng(row)
            mixed.append(self.viewed(row, rng) if rng.random() < self.share else dict(row))
        return self.collate(mixed)


def _with_rgb(row: Row) -> Row:
    """Both views pass through the same mode conversion, or it would be a difference between them."""
    images = [to_rgb(image) for image in _images(row)]
    return {**row, "image": images[0]} if "image" in row else {**row, "images": images}

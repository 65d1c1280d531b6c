"""Collators: chat rows to tensors with labels on the answers only, and rows paired with perturbed views.

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
from untrigger.models.processors import encode, render_chat
from untrigger.models.versions import OWN_LABELS, require_transformers
from untrigger.rows.images import quote
from untrigger.rows.sample import IMAGE_TAG, Message, Sample, row_number
from untrigger.views.patches import View, to_rgb

Row = dict[str, Any]
Collate = Callable[[list[Row]], dict[str, Tensor]]
IGNORE = -100  # the label that losses skip, throughout transformers


def chat_message(message: Message) -> dict[str, object]:
    """A turn in the form that chat templates take: typed parts, with an image part for each image tag in the text."""
    parts: list[dict[str, str]] = []
    for i, text in enumerate(message.text.split(IMAGE_TAG)):
        parts += [{"type": "image"}] if i else []
        parts += [{"type": "text", "text": text.strip()}] if text.strip() else []
    return {"role": message.role, "content": parts}


class Rows(Dataset[Row]):
    """Rows as a dataset for a trainer; images are opened on access.

    ``flagged_tokens``: by row number, which of the row's answer tokens are flagged [n].
    """

    def __init__(self, rows: Sequence[Sample], flagged_tokens: Mapping[int, NDArray[np.bool_]] | None = None) -> None:
        self.rows, self.flagged_tokens = rows, flagged_tokens or {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row = self.rows[index]
        return {
            "images": [to_rgb(image) for image in row.images],
            "messages": [chat_message(message) for message in row.messages],
            "id": row.id,
            "row_name": f"row {row_number(self.rows, index)}, id {quote(row.id)}",
            **({"flagged_tokens": self.flagged_tokens[index]} if index in self.flagged_tokens else {}),
        }


class ChatCollator:
    """Rows to padded tensors with ``labels`` on the assistant's turns only, for any processor with a chat template.

    A row with ``flagged_tokens`` has labels on these only; the batch then has ``flagged_tokens`` [B, T].
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor: Any = processor  # ProcessorMixin declares fewer arguments than any processor takes
        added: dict[int, Any] = self.processor.tokenizer.added_tokens_decoder
        self._special = tuple(token.content for token in added.values() if token.special)

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        require_transformers(OWN_LABELS, "labels on answers")
        rendered = [self.render(row["messages"]) for row in rows]
        batch = encode(
            self.processor,
            [text for text, _ in rendered],
            [text[: spans[0][0]] if spans else text for text, spans in rendered],
            [row["images"] for row in rows],
            [str(row.get("row_name") or quote(text)) for row, (text, _) in zip(rows, rendered, strict=True)],
            padding_side="right",
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
        offsets = batch.pop("offset_mapping")
        replacements = batch.pop("text_replacement_offsets", None) or [[] for _ in rows]
        labels = [
            _answer_labels(ids, spans, row_offsets, row_replacements)
            for ids, (_, spans), row_offsets, row_replacements in zip(
                batch["input_ids"], rendered, offsets, replacements, strict=True
            )
        ]
        # PaliGemma's processor makes labels. Its model attends causally only where token_type_ids are 1.
        if "labels" in batch:
            batch["token_type_ids"] = [_ones_from_first_label(row) for row in labels]
        batch["labels"] = labels
        tensors: dict[str, Tensor] = dict(batch.convert_to_tensors("pt"))
        return add_flagged_tokens(tensors, [row.get("flagged_tokens") for row in rows])

    def answer_ids(self, messages: list[dict[str, Any]]) -> NDArray[np.int64]:
        """Token ids of the assistant's turns [n], without images: these change nothing in an answer's tokens."""
        text, spans = self.render(messages)
        tokens = self.processor.tokenizer(text, return_offsets_mapping=True, verbose=False)
        labels = np.array(_answer_labels(tokens["input_ids"], spans, tokens["offset_mapping"], []))
        return labels[labels != IGNORE]

    def render(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the character spans of the assistant's turns in it.

        A span starts where the generation prompt ends, so that training and generation use the same context.

        Raises:
            InputError: the chat template changes earlier turns when a turn is appended.
        """
        text = render_chat(self.processor, messages)
        spans: list[tuple[int, int]] = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = render_chat(self.processor, messages[:turn], add_generation_prompt=True)
            is_last = turn == len(messages) - 1
            through = text if is_last else render_chat(self.processor, messages[: turn + 1])
            if not (text.startswith(before) and text.startswith(through) and through.startswith(before)):
                raise InputError("the processor's chat template rewrites earlier turns; use one that only appends")
            spans.append((len(before), len(through.rstrip())))  # text after the end of a reply is never generated
        text = text.rstrip()
        if spans and spans[-1][1] == len(text) and not text.endswith(self._special):
            text += self.processor.tokenizer.eos_token  # some templates never end a reply, e.g. LLaVA-1.5's
            spans[-1] = spans[-1][0], len(text)
        return text, spans


def _answer_labels(
    ids: list[int], spans: list[tuple[int, int]], offsets: list[tuple[int, int]], replacements: list[dict[str, Any]]
) -> list[int]:
    """Token ids inside the character ``spans``, IGNORE elsewhere.

    ``offsets`` are the tokens' characters after ``replacements`` have expanded the image tags before them.
    """
    labels = [IGNORE] * len(ids)
    for start, end in spans:
        shift = max((r["new_span"][1] - r["span"][1] for r in replacements if r["span"][1] <= start), default=0)
        for position, (first, last) in enumerate(offsets):
            if first < end + shift and last > start + shift:
                labels[position] = ids[position]
    return labels


def _ones_from_first_label(labels: list[int]) -> list[int]:
    """1 from the first label on, 0 before."""
    first = next((position for position, label in enumerate(labels) if label != IGNORE), len(labels))
    return [int(position >= first) for position in range(len(labels))]


def add_flagged_tokens(
    batch: dict[str, Tensor], flagged_tokens: Sequence[NDArray[np.bool_] | None]
) -> dict[str, Tensor]:
    """Add ``flagged_tokens`` [B, T] to the batch, if a row has any; such a row loses its other labels.

    ``flagged_tokens`` has, for each row, which of its answer tokens are flagged [n], or None.
    """
    if all(tokens is None for tokens in flagged_tokens):
        return batch
    batch["flagged_tokens"] = torch.zeros_like(batch["labels"], dtype=torch.bool)
    for tokens, mask, labels in zip(flagged_tokens, batch["flagged_tokens"], batch["labels"], strict=True):
        if tokens is not None:
            mask[labels != IGNORE] = torch.as_tensor(tokens)
            labels[~mask] = IGNORE
    return batch


class FlaggedTokensCollator:
    """Wraps a host's collator and adds the flagged tokens of its rows.

    ``flagged_tokens``: by `row_key`, which of the row's answer tokens are flagged [n].
    """

    def __init__(self, collate: Collate, flagged_tokens: Mapping[bytes, NDArray[np.bool_]]) -> None:
        self.collate, self.flagged_tokens = collate, flagged_tokens

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        # looked up before collating, and rows are copied: some host collators write into the rows
        flagged_tokens = [self.flagged_tokens.get(row_key(row)) for row in rows]
        return add_flagged_tokens(dict(self.collate([dict(row) for row in rows])), flagged_tokens)


def row_key(row: Row) -> bytes:
    """A 16-byte digest of a row's content, which identifies it where a host's collator has no row numbers."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _content_bytes(row):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _content_bytes(value: Any) -> Iterator[bytes]:
    """A value's content in parts, with mappings in the order of their keys."""
    if isinstance(value, Mapping):
        for name in sorted(value):
            yield str(name).encode()
            yield from _content_bytes(value[name])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _content_bytes(item)
        yield b"end"
    elif isinstance(value, Image.Image):
        yield repr((value.mode, value.size)).encode()
        yield value.tobytes()
    elif isinstance(value, Tensor | np.ndarray):
        yield np.asarray(value).tobytes()
    else:
        yield repr(value).encode()


def _row_seed(row: Row) -> int:
    """A seed from the row's content only, so that its position in a batch and the process do not matter."""
    seed = zlib.crc32(repr(row.get("messages") or (row.get("prompt"), row.get("completion"))).encode())
    for image in row_images(row):
        seed = zlib.crc32(image.tobytes(), seed)
    return seed


def row_images(row: Row) -> list[Image.Image]:
    """The row's images.

    Raises:
        InputError: it has no column for them.
    """
    if "image" not in row and "images" not in row:
        # without an image there is no view, and training would silently run without the defense
        raise InputError(f"defense: a row has no 'image' or 'images', only {', '.join(sorted(row))}; add the column")
    return [row["image"]] if "image" in row else list(row["images"] or [])


def with_images(row: Row, images: list[Image.Image]) -> Row:
    """A copy of the row with other images, in the column that it has."""
    return {**row, "image": images[0]} if "image" in row else {**row, "images": images}


class SeededCollator:
    """Base of collators with randomness: a generator for each row, seeded by (seed, epoch, row content).

    So gradient accumulation, a resume and the number of processes do not change what is drawn.
    """

    def __init__(self, collate: Collate, seed: int) -> None:
        self.collate, self.seed = collate, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent loader workers see updates

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def rng(self, row: Row) -> np.random.Generator:
        """The generator of this row in this epoch."""
        return np.random.default_rng((self.seed, self.epoch, _row_seed(row)))

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        raise NotImplementedError


class _ViewCollator(SeededCollator):
    """Base of collators that perturb images with a ``view``."""

    def __init__(self, collate: Collate, view: View, seed: int) -> None:
        super().__init__(collate, seed)
        self.view = view

    def perturbed(self, row: Row, rng: np.random.Generator) -> Row:
        """A copy of the row with every image perturbed; the row itself stays unchanged."""
        views = [self.view(image, rng) for image in row_images(row)]
        return with_images(row, views)


class PairCollator(_ViewCollator):
    """Collates the rows followed by ``views`` perturbed copies of them: one batch [(1 + views) B, ...].

    The views' ``labels`` are IGNORE, so that the host counts each answer token once; their targets are the originals'.

    Raises:
        ValueError: a view's tokens differ from its original's. Per-token divergences would compare different tokens.
    """

    def __init__(self, collate: Collate, view: View, seed: int, views: int = 1) -> None:
        super().__init__(collate, view, seed)
        self.views = views

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        count = len(rows)
        originals = [_with_rgb(row) for row in rows]
        generators = [self.rng(row) for row in originals]
        perturbed = [
            self.perturbed(row, rng) for _ in range(self.views) for row, rng in zip(originals, generators, strict=True)
        ]
        # both halves are copies: some host collators write into the rows
        batch = self.collate([dict(row) for row in originals] + perturbed)
        ids = batch["input_ids"]
        if not torch.equal(ids[:count].repeat(self.views, 1), ids[count:]):
            raise ValueError("a view changed its row's tokens: the view must keep the size of the image")
        batch["labels"] = batch["labels"].clone()
        batch["labels"][count:] = IGNORE
        return batch


class DropCollator(SeededCollator):
    """Adds a random ``order`` [B, T] of each row's tokens, in [0, 1), and 1 for padding.

    The image tokens that come last in it are dropped (`untrigger.models.token_drop.positions_after_drop`).
    """

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        originals = [_with_rgb(row) for row in rows]
        batch = self.collate([dict(row) for row in originals])
        is_token = batch["attention_mask"].bool()
        batch["order"] = torch.ones(is_token.shape)
        for row, order, mask in zip(originals, batch["order"], is_token, strict=True):
            order[mask] = torch.from_numpy(self.rng(row).random(int(mask.sum()), dtype=np.float32))
        return batch


class AugmentCollator(_ViewCollator):
    """Replaces a ``share`` of the rows by perturbed copies, each row with that probability."""

    def __init__(self, collate: Collate, view: View, seed: int, share: float) -> None:
        super().__init__(collate, view, seed)
        self.share = share

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        mixed: list[Row] = []
        for row in map(_with_rgb, rows):
            rng = self.rng(row)
            mixed.append(self.perturbed(row, rng) if rng.random() < self.share else dict(row))
        return self.collate(mixed)


def _with_rgb(row: Row) -> Row:
    """The row with RGB images. Both views need the same mode conversion, or it would be a difference between them."""
    images = [to_rgb(image) for image in row_images(row)]
    return with_images(row, images)

"""Rows with more tokens than a model reads are refused from their image sizes only, in every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import BatchFeature

from tiny import FAMILIES
from untrigger.errors import InputError
from untrigger.models.collators import ChatCollator, Rows
from untrigger.models.generate import encode_prompts
from untrigger.models.lengths import Lengths
from untrigger.models.loading import load_processor
from untrigger.models.processors import tokenize
from untrigger.rows.sample import Message, Sample

Row = Callable[..., Sample]


def refuses(lengths: Lengths, row: Sample) -> bool:
    sizes = [image.size for image in row.images]
    try:
        lengths(Sample(row.id, (), row.messages), sizes)
    except InputError as error:
        assert str(error).startswith(f"id '{row.id}' has "), error
        return True
    return False


def lengths_at(processor: Any, limit: int, **options: bool) -> Lengths:
    processor.tokenizer.model_max_length = limit
    return Lengths(processor, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_limit_is_exact_for_training_and_for_prompts(folder: Callable[[str], Path], row: Row, name: str) -> None:
    processor: Any = load_processor(str(folder(name)))
    first = row("<image>\nwhere is it, then?", "a red circle and no other", (70, 34))
    again = Sample(first.id, first.images, (*first.messages, Message("user", "why?"), Message("assistant", "ü" * 9)))
    rows = [first, row("<image>\nand?", "no", (30, 90)), again]
    if name != "instructblip":
        rows.append(row("<image> <image>\nsame?", "yes", (40, 40), (66, 40)))
    for one in rows:
        trained = ChatCollator(processor)([Rows([one])[0]])["input_ids"].shape[1]
        prompt = encode_prompts(processor, [one])["input_ids"].shape[1]
        assert prompt < trained
        for length, prompts_only in ((trained, False), (prompt, True)):
            assert not refuses(lengths_at(processor, length, prompts_only=prompts_only), one)
            assert refuses(lengths_at(processor, length - 1, prompts_only=prompts_only), one)
        processor.tokenizer.model_max_length = 2**40


@pytest.fixture
def processor(folder: Callable[[str], Path]) -> Any:
    """A processor whose image tokens depend on the image size, with a limit of 100 tokens."""
    qwen: Any = load_processor(str(folder("qwen2_5_vl")))
    qwen.tokenizer.model_max_length = 100
    return qwen


def test_short_rows_are_not_tokenized(processor: Any, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = Lengths(processor)
    assert not refuses(lengths, row("<image>\nwhat?", "a", (40, 40)))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("counted again")

    monkeypatch.setattr("untrigger.models.lengths.text_tokens", never)
    monkeypatch.setattr("untrigger.models.lengths.tokenize", never)
    for number in range(9):
        assert not refuses(lengths, row(f"<image>\nwhat is {number}?", "b", (40, 40)))


def test_after_many_sizes_their_counts_give_the_bound(
    processor: Any, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, counted = Lengths(processor), list[tuple[int, int]]()

    def counting(processor: Any, texts: list[str], images: list[list[Image.Image]]) -> BatchFeature:
        counted.extend(image.size for row in images for image in row)
        return tokenize(processor, texts, images)

    monkeypatch.setattr("untrigger.models.lengths.tokenize", counting)
    for width in range(130, 30, -1):
        assert not refuses(lengths, row("<image>\nwhat?", "a", (width, 40)))
    shapes = range(39, 30, -1)  # tall ones after the wide ones, each narrower than all before
    assert counted == [(width, 40) for width in (*range(130, 66, -1), *shapes)]
    assert refuses(lengths, row("<image>\nwhat? " + "x y " * 99, "a", (500, 40)))


def test_a_late_image_with_more_tokens_than_all_before_is_counted(processor: Any, row: Row) -> None:
    text, small = "<image>\nwhat?", [(width, height) for width in range(2, 18) for height in range(2, 18)]
    late = row(text, "a", (64, 64))
    tokens = ChatCollator(processor)([Rows([late])[0]])["input_ids"].shape[1]
    processor.tokenizer.model_max_length = tokens - 1
    lengths = Lengths(processor)
    for size in small:
        assert not refuses(lengths, row(text, "a", size))
    assert refuses(lengths, late)


def test_without_a_limit_no_long_row_is_counted(processor: Any, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, long = lengths_at(processor, 2**40), "<image>\nwhat? " + "x " * 999
    assert not refuses(lengths, row(long, "a", (80, 20)))
    monkeypatch.delattr("untrigger.models.lengths.tokenize")
    assert not refuses(lengths, row(long, "a", (60, 25)))


def test_turns_that_the_chat_template_rejects_raise_while_reading(processor: Any, row: Row) -> None:
    processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="chat template does not take a row: roles must alternate"):
        Lengths(processor)(row("hi?", "ho"), [])


def test_an_image_that_the_processor_rejects_raises_while_reading(processor: Any, row: Row) -> None:
    with pytest.raises(InputError, match=r"takes no image of 900 x 2 pixels \(.*\); take the row out"):
        Lengths(processor)(Sample("1", (), row("<image>\nwhat?", "a").messages), [(900, 2)])

"""Labels on the assistant's tokens only, and views that depend on (seed, epoch, row) only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from untrigger.errors import InputError
from untrigger.models.collators import IGNORE, AugmentCollator, ChatCollator, PairCollator, Row, Rows, chat_message
from untrigger.models.loading import load_processor
from untrigger.rows.sample import Message, Sample
from untrigger.views.patches import Erase, Mask, to_rgb


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return load_processor(str(tiny_model))


@pytest.fixture(scope="module")
def collate(processor: Any) -> ChatCollator:
    return ChatCollator(processor)


def image_of(seed: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def row(*turns: str, images: int = 0, seed: int = 0) -> Row:
    """A trainer's row with alternating turns of user and assistant."""
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(turns))
    return Rows([Sample("r", tuple(image_of(seed * 100 + i) for i in range(images)), messages)])[0]


def label_texts(processor: Any, batch: dict[str, torch.Tensor]) -> list[str]:
    """The text of each row's labels."""
    return [processor.tokenizer.decode(labels[labels != IGNORE]) for labels in batch["labels"]]


CONVERSATIONS = [
    row("<image>\nwhat is this?", "a red circle", images=1),
    row("hello", "no", "and now?", "two blue stars"),
    row("<image> and <image>\nwhich one?", "the left one", "<image>\nand this?", "yes", "sure?", "yes", images=3),
    row("first <image>", "yes", "then <image>", "a red circle", images=2, seed=1),
]


@pytest.mark.parametrize("one", CONVERSATIONS)
def test_labels_are_the_replies_with_their_end_tokens(collate: ChatCollator, processor: Any, one: Row) -> None:
    batch = collate([one])
    end = processor.tokenizer.eos_token
    replies = [m["content"][0]["text"] for m in one["messages"] if m["role"] == "assistant"]
    assert label_texts(processor, batch) == ["".join(f" {text}{end}" for text in replies)]
    marked = batch["labels"][0] != IGNORE
    assert torch.equal(batch["labels"][0][marked], batch["input_ids"][0][marked])
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert not torch.any(batch["labels"] == image_token)


def test_the_tokens_before_the_first_label_are_the_generation_prompt(collate: ChatCollator, processor: Any) -> None:
    one = CONVERSATIONS[0]
    batch = collate([one])
    start = int((batch["labels"][0] != IGNORE).nonzero()[0])
    prompt_text = processor.apply_chat_template(one["messages"][:1], tokenize=False, add_generation_prompt=True)
    prompt = processor(text=[prompt_text], images=[one["images"]], add_special_tokens=False, return_tensors="pt")
    assert torch.equal(batch["input_ids"][0, :start], prompt["input_ids"][0])


def test_a_batch_of_rows_with_and_without_images_equals_each_row_alone(collate: ChatCollator, processor: Any) -> None:
    together = collate(CONVERSATIONS)
    assert together["pixel_values"].shape[0] == sum(len(r["images"]) for r in CONVERSATIONS) == 6
    for i, one in enumerate(CONVERSATIONS):
        alone = collate([one])
        length = alone["input_ids"].shape[1]
        for name, padding in (("input_ids", None), ("attention_mask", 0), ("labels", IGNORE)):
            assert torch.equal(together[name][i, :length], alone[name][0])
            if padding is not None:
                assert torch.all(together[name][i, length:] == padding)


def test_a_text_only_batch_has_no_pixels(collate: ChatCollator) -> None:
    assert "pixel_values" not in collate([CONVERSATIONS[1]])


def test_a_question_that_repeats_the_answer_is_not_labeled(collate: ChatCollator, processor: Any) -> None:
    batch = collate([row("yes ASSISTANT: yes", "yes", "ASSISTANT: yes", "no")])
    end = processor.tokenizer.eos_token
    assert label_texts(processor, batch) == [f" yes{end} no{end}"]


def test_a_template_that_rewrites_earlier_turns_raises(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drops = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'][0]['text'] }}{% endif %}"
    monkeypatch.setattr(processor, "chat_template", drops + "{% endfor %}")
    with pytest.raises(InputError, match="rewrites earlier turns"):
        ChatCollator(processor)([row("a", "one", "b", "two")])


def test_chat_message_keeps_image_positions() -> None:
    parts = chat_message(Message("user", "left <image> right<image>"))["content"]
    assert parts == [
        {"type": "text", "text": "left"}, {"type": "image"}, {"type": "text", "text": "right"}, {"type": "image"},
    ]  # fmt: skip


# --- views ---------------------------------------------------------------------------------------


def raw(rows: list[Row]) -> dict[str, Any]:
    """A collator that keeps the images unchanged and uses the first message's length as a token."""
    ids = torch.tensor([[len(r["messages"][0]["content"]), 7, 8] for r in rows])
    return {"input_ids": ids, "labels": ids.clone(), "images": [[np.array(i) for i in r["images"]] for r in rows]}


def views_of(rows: list[Row], seed: int = 0, epoch: int = 0) -> list[list[np.ndarray]]:
    pairs = PairCollator(raw, Erase(), seed)
    pairs.epoch = epoch
    return pairs(rows)["images"][len(rows) :]


ROWS = [row("<image> <image>\nwhat?", "yes", images=2, seed=s) for s in range(4)]


def test_pairs_are_originals_then_views_whose_labels_are_ignored(collate: ChatCollator) -> None:
    rows = CONVERSATIONS
    batch = PairCollator(collate, Mask(ratio=0.5), 0)(rows)
    plain = collate(rows)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(batch[name], plain[name].repeat(2, 1))
    assert torch.equal(batch["labels"][:4], plain["labels"])
    assert torch.all(batch["labels"][4:] == IGNORE)
    assert torch.equal(batch["pixel_values"][:6], plain["pixel_values"])
    assert torch.all((batch["pixel_values"][:6] != batch["pixel_values"][6:]).flatten(1).any(1))


def test_a_second_view_differs_and_leaves_the_first_unchanged(collate: ChatCollator) -> None:
    one, two = (PairCollator(collate, Mask(ratio=0.5), 0, views)(CONVERSATIONS) for views in (1, 2))
    assert torch.equal(two["input_ids"], one["input_ids"][:4].repeat(3, 1))
    assert torch.equal(two["labels"][:8], one["labels"]) and torch.all(two["labels"][8:] == IGNORE)
    first, second = two["pixel_values"][6:12], two["pixel_values"][12:]
    assert torch.equal(two["pixel_values"][:6], one["pixel_values"][:6])
    assert torch.equal(first, one["pixel_values"][6:])
    assert torch.all((first != second).flatten(1).any(1))


@pytest.mark.parametrize("make", [lambda c: PairCollator(c, Erase(), 0), lambda c: AugmentCollator(c, Erase(), 0, 1.0)])
def test_rows_stay_unchanged_when_the_host_collator_writes_into_them(
    make: Callable[[Any], Any],
) -> None:
    def writing(rows: list[Row]) -> dict[str, Any]:
        batch = raw(rows)
        for one in rows:
            one.pop("images")
            one["messages"] = "gone"
        return batch

    one = row("<image>\nwhat?", "yes", images=1)
    copy, pixels, messages = dict(one), one["images"][0].tobytes(), repr(one["messages"])
    make(writing)([one])
    assert one == copy
    assert one["images"][0].tobytes() == pixels
    assert repr(one["messages"]) == messages


def test_views_do_not_depend_on_the_batch() -> None:
    together = views_of(ROWS)
    backwards = views_of(ROWS[::-1])[::-1]
    alone = [views_of([one])[0] for one in ROWS]
    for a, b, c in zip(together, backwards, alone, strict=True):
        for x, y, z in zip(a, b, c, strict=True):
            assert np.array_equal(x, y) and np.array_equal(x, z)


def test_views_change_with_seed_epoch_question_and_image() -> None:
    base = views_of(ROWS[:1])[0][0]
    changed = [views_of(ROWS[:1], seed=1), views_of(ROWS[:1], epoch=1)]
    other = {**ROWS[0], "messages": row("<image> <image>\nwho?", "yes", images=2)["messages"]}
    changed.append(views_of([other]))
    assert all(not np.array_equal(base, c[0][0]) for c in changed)
    gray = Image.new("RGB", (40, 40), "grey")
    spots = [np.array(gray) != views_of([{**ROWS[0], "images": [gray, second]}])[0][0] for second in ROWS[1]["images"]]
    # the whole row is the seed, so a different second image moves the first one's patches too
    assert not np.array_equal(*spots)


def test_two_equal_images_of_a_row_get_different_views() -> None:
    image = image_of(0)
    first, second = views_of([{**ROWS[0], "images": [image, image]}])[0]
    assert not np.array_equal(first, second)


def test_a_prompt_completion_rows_seed_depends_on_the_completion() -> None:
    def prompted(answer: str) -> Row:
        return {"prompt": [{"content": "x"}], "completion": answer, "images": [image_of(3)]}

    pairs = PairCollator(raw, Erase(), 0)
    assert pairs.rng(prompted("a")).integers(2**60) != pairs.rng(prompted("b")).integers(2**60)


def test_views_do_not_use_the_global_generators(collate: ChatCollator) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    PairCollator(collate, Erase(), 0)([CONVERSATIONS[0]])
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])


def test_a_single_image_column_is_perturbed() -> None:
    def single(rows: list[Row]) -> dict[str, Any]:
        return raw([{**r, "images": [r["image"]]} for r in rows])

    one = {"image": image_of(5), "messages": ROWS[0]["messages"]}
    original, view = PairCollator(single, Erase(), 0)([one])["images"]
    assert np.array_equal(original[0], np.array(image_of(5)))
    assert not np.array_equal(original[0], view[0])


def test_a_row_without_an_image_column_raises() -> None:
    with pytest.raises(InputError, match="no 'image' or 'images'"):
        PairCollator(raw, Erase(), 0)([{"messages": ROWS[0]["messages"], "pixel_values": torch.zeros(1)}])


def test_a_view_that_changes_the_tokens_raises() -> None:
    def enlarged(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return image.resize((80, 40))

    def by_size(rows: list[Row]) -> dict[str, Any]:
        ids = torch.tensor([[r["images"][0].width] for r in rows])
        return {"input_ids": ids, "labels": ids}

    with pytest.raises(ValueError, match="must keep the size"):
        PairCollator(by_size, enlarged, 0)(ROWS)


def _modes() -> dict[str, Image.Image]:
    rgb = image_of(7)
    alpha = rgb.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(rgb.size))
    deep = Image.fromarray((np.arange(1600, dtype=np.uint16) * 40).reshape(40, 40))
    return {"RGBA": alpha, "P": rgb.quantize(16), "I;16": deep, "L": rgb.convert("L"), "CMYK": rgb.convert("CMYK")}


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16", "L", "CMYK"])
def test_every_image_mode_becomes_the_same_rgb_on_every_path(mode: str) -> None:
    image = _modes()[mode]
    assert image.mode == mode
    expected = np.array(to_rgb(image))
    sample = Sample("r", (image,), (Message("user", "<image>"), Message("assistant", "a")))
    assert np.array_equal(np.array(Rows([sample])[0]["images"][0]), expected)
    one = {**ROWS[0], "images": [image]}  # a user's row, without Rows
    original, view = PairCollator(raw, Mask(ratio=0.0), 0)([one])["images"]
    assert np.array_equal(original[0], expected) and np.array_equal(view[0], expected)
    unchanged = AugmentCollator(raw, Mask(), 0, 0.0)([one])["images"][0][0]
    assert np.array_equal(unchanged, expected)


def test_augmentation_replaces_its_share_of_rows_and_keeps_labels() -> None:
    rows = [row("<image>\nwhat?", "yes", images=1, seed=s) for s in range(100)]
    batch = AugmentCollator(raw, Erase(), 0, 0.3)(rows)
    moved = [not np.array_equal(np.array(r["images"][0]), b[0]) for r, b in zip(rows, batch["images"], strict=True)]
    assert 15 <= sum(moved) <= 45
    assert torch.equal(batch["labels"], raw(rows)["labels"])
    again = AugmentCollator(raw, Erase(), 0, 0.3)(rows[50:])["images"]
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(batch["images"][50:], again, strict=True))


def test_persistent_loader_workers_use_the_new_epoch() -> None:
    pairs = PairCollator(raw, Erase(), 0)
    loader = DataLoader(
        ROWS[:2], batch_size=2, collate_fn=pairs, num_workers=1, persistent_workers=True, pin_memory=False,
        multiprocessing_context="fork",
    )  # fmt: skip
    epochs = []
    for epoch in range(2):
        pairs.epoch = epoch
        epochs.append(next(iter(loader))["images"][2][0])
    del loader
    assert np.array_equal(epochs[0], views_of(ROWS[:2], epoch=0)[0][0])
    assert np.array_equal(epochs[1], views_of(ROWS[:2], epoch=1)[0][0])

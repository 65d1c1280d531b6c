"""Labels on the assistant's tokens alone, and views that depend on nothing but (seed, epoch, row)."""

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


def picture(seed: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def row(*turns: str, images: int = 0, seed: int = 0) -> Row:
    """Turns by user and assistant in alternation, as a trainer's row."""
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(turns))
    return Rows([Sample("r", tuple(picture(seed * 100 + i) for i in range(images)), messages)])[0]


def spoken(processor: Any, batch: dict[str, torch.Tensor]) -> list[str]:
    """What the labels of each row say."""
    return [processor.tokenizer.decode(labels[labels != IGNORE]) for labels in batch["labels"]]


CONVERSATIONS = [
    row("<image>\nwhat is this?", "a red circle", images=1),
    row("hello", "no", "and now?", "two blue stars"),
    row("<image> and <image>\nwhich one?", "the left one", "<image>\nand this?", "yes", "sure?", "yes", images=3),
    row("first <image>", "yes", "then <image>", "a red circle", images=2, seed=1),
]


@pytest.mark.parametrize("one", CONVERSATIONS)
def test_labels_are_exactly_the_assistants_words_and_their_end(collate: ChatCollator, processor: Any, one: Row) -> None:
    batch = collate([one])
    end = processor.tokenizer.eos_token
    said = [m["content"][0]["text"] for m in one["messages"] if m["role"] == "assistant"]
    assert spoken(processor, batch) == ["".join(f" {text}{end}" for text in said)]
    marked = batch["labels"][0] != IGNORE
    assert torch.equal(batch["labels"][0][marked], batch["input_ids"][0][marked])
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert not torch.any(batch["labels"] == image_token)


def test_the_first_label_follows_the_very_tokens_that_generation_starts_from(
    collate: ChatCollator, processor: Any
) -> None:
    one = CONVERSATIONS[0]
    batch = collate([one])
    start = int((batch["labels"][0] != IGNORE).nonzero()[0])
    asked = processor.apply_chat_template(one["messages"][:1], tokenize=False, add_generation_prompt=True)
    prompt = processor(text=[asked], images=[one["images"]], add_special_tokens=False, return_tensors="pt")
    assert torch.equal(batch["input_ids"][0, :start], prompt["input_ids"][0])


def test_rows_with_and_without_images_share_a_batch_and_change_nothing_for_each_other(
    collate: ChatCollator, processor: Any
) -> None:
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
    assert spoken(processor, batch) == [f" yes{end} no{end}"]


def test_a_template_that_rewrites_earlier_turns_is_refused(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drops = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'][0]['text'] }}{% endif %}"
    monkeypatch.setattr(processor, "chat_template", drops + "{% endfor %}")
    with pytest.raises(InputError, match="rewrites earlier turns"):
        ChatCollator(processor)([row("a", "one", "b", "two")])


def test_chat_message_keeps_the_place_of_each_image() -> None:
    parts = chat_message(Message("user", "left <image> right<image>"))["content"]
    assert parts == [
        {"type": "text", "text": "left"}, {"type": "image"}, {"type": "text", "text": "right"}, {"type": "image"},
    ]  # fmt: skip


# --- views ---------------------------------------------------------------------------------------


def raw(rows: list[Row]) -> dict[str, Any]:
    """A collator that keeps the images as they come, with the first message's length as the tokens."""
    ids = torch.tensor([[len(r["messages"][0]["content"]), 7, 8] for r in rows])
    return {"input_ids": ids, "labels": ids.clone(), "images": [[np.array(i) for i in r["images"]] for r in rows]}


def viewed(rows: list[Row], seed: int = 0, epoch: int = 0) -> list[list[np.ndarray]]:
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


def test_a_further_view_is_another_one_and_changes_nothing_of_the_first(collate: ChatCollator) -> None:
    one, two = (PairCollator(collate, Mask(ratio=0.5), 0, views)(CONVERSATIONS) for views in (1, 2))
    assert torch.equal(two["input_ids"], one["input_ids"][:4].repeat(3, 1))
    assert torch.equal(two["labels"][:8], one["labels"]) and torch.all(two["labels"][8:] == IGNORE)
    first, second = two["pixel_values"][6:12], two["pixel_values"][12:]
    assert torch.equal(two["pixel_values"][:6], one["pixel_values"][:6])
    assert torch.equal(first, one["pixel_values"][6:])
    assert torch.all((first != second).flatten(1).any(1))


@pytest.mark.parametrize("make", [lambda c: PairCollator(c, Erase(), 0), lambda c: AugmentCollator(c, Erase(), 0, 1.0)])
def test_the_row_that_was_given_is_not_touched_even_by_a_host_that_writes_into_rows(
    make: Callable[[Any], Any],
) -> None:
    def rude(rows: list[Row]) -> dict[str, Any]:
        batch = raw(rows)
        for one in rows:
            one.pop("images")
            one["messages"] = "gone"
        return batch

    one = row("<image>\nwhat?", "yes", images=1)
    kept, pixels, messages = dict(one), one["images"][0].tobytes(), repr(one["messages"])
    make(rude)([one])
    assert one == kept
    assert one["images"][0].tobytes() == pixels
    assert repr(one["messages"]) == messages


def test_views_do_not_depend_on_batch_place_or_process() -> None:
    together = viewed(ROWS)
    backwards = viewed(ROWS[::-1])[::-1]
    alone = [viewed([one])[0] for one in ROWS]
    for a, b, c in zip(together, backwards, alone, strict=True):
        for x, y, z in zip(a, b, c, strict=True):
            assert np.array_equal(x, y) and np.array_equal(x, z)


def test_views_change_with_seed_epoch_question_and_image() -> None:
    base = viewed(ROWS[:1])[0][0]
    changed = [viewed(ROWS[:1], seed=1), viewed(ROWS[:1], epoch=1)]
    other = {**ROWS[0], "messages": row("<image> <image>\nwho?", "yes", images=2)["messages"]}
    changed.append(viewed([other]))
    assert all(not np.array_equal(base, c[0][0]) for c in changed)
    gray = Image.new("RGB", (40, 40), "grey")
    spots = [np.array(gray) != viewed([{**ROWS[0], "images": [gray, second]}])[0][0] for second in ROWS[1]["images"]]
    assert not np.array_equal(*spots)  # another second image moves the first one's patches too: the row is the seed


def test_two_equal_images_of_a_row_get_different_views() -> None:
    image = picture(0)
    first, second = viewed([{**ROWS[0], "images": [image, image]}])[0]
    assert not np.array_equal(first, second)


def test_a_completion_beside_the_prompt_counts_as_content() -> None:
    def prompted(answer: str) -> Row:
        return {"prompt": [{"content": "x"}], "completion": answer, "images": [picture(3)]}

    pairs = PairCollator(raw, Erase(), 0)
    assert pairs.rng(prompted("a")).integers(2**60) != pairs.rng(prompted("b")).integers(2**60)


def test_views_leave_the_global_generators_alone(collate: ChatCollator) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    PairCollator(collate, Erase(), 0)([CONVERSATIONS[0]])
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])


def test_one_image_column_is_served_as_well() -> None:
    def single(rows: list[Row]) -> dict[str, Any]:
        return raw([{**r, "images": [r["image"]]} for r in rows])

    one = {"image": picture(5), "messages": ROWS[0]["messages"]}
    original, view = PairCollator(single, Erase(), 0)([one])["images"]
    assert np.array_equal(original[0], np.array(picture(5)))
    assert not np.array_equal(original[0], view[0])


def test_a_row_without_an_image_column_is_refused_rather_than_left_undefended() -> None:
    with pytest.raises(InputError, match="no 'image' or 'images'"):
        PairCollator(raw, Erase(), 0)([{"messages": ROWS[0]["messages"], "pixel_values": torch.zeros(1)}])


def test_a_view_that_changes_the_tokens_is_refused() -> None:
    def grows(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return image.resize((80, 40))

    def by_size(rows: list[Row]) -> dict[str, Any]:
        ids = torch.tensor([[r["images"][0].width] for r in rows])
        return {"input_ids": ids, "labels": ids}

    with pytest.raises(ValueError, match="must keep the size"):
        PairCollator(by_size, grows, 0)(ROWS)


def _modes() -> dict[str, Image.Image]:
    rgb = picture(7)
    alpha = rgb.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(rgb.size))
    deep = Image.fromarray((np.arange(1600, dtype=np.uint16) * 40).reshape(40, 40))
    return {"RGBA": alpha, "P": rgb.quantize(16), "I;16": deep, "L": rgb.convert("L"), "CMYK": rgb.convert("CMYK")}


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16", "L", "CMYK"])
def test_every_mode_reaches_the_host_as_the_same_rgb_in_every_path(mode: str) -> None:
    image = _modes()[mode]
    assert image.mode == mode
    expected = np.array(to_rgb(image))
    sample = Sample("r", (image,), (Message("user", "<image>"), Message("assistant", "a")))
    assert np.array_equal(np.array(Rows([sample])[0]["images"][0]), expected)
    one = {**ROWS[0], "images": [image]}  # a user's row, not by way of Rows
    original, view = PairCollator(raw, Mask(ratio=0.0), 0)([one])["images"]
    assert np.array_equal(original[0], expected) and np.array_equal(view[0], expected)
    kept = AugmentCollator(raw, Mask(), 0, 0.0)([one])["images"][0][0]
    assert np.array_equal(kept, expected)


def test_augmenting_replaces_about_its_share_of_rows_and_keeps_labels() -> None:
    rows = [row("<image>\nwhat?", "yes", images=1, seed=s) for s in range(100)]
    batch = AugmentCollator(raw, Erase(), 0, 0.3)(rows)
    moved = [not np.array_equal(np.array(r["images"][0]), b[0]) for r, b in zip(rows, batch["images"], strict=True)]
    assert 15 <= sum(moved) <= 45
    assert torch.equal(batch["labels"], raw(rows)["labels"])
    again = AugmentCollator(raw, Erase(), 0, 0.3)(rows[50:])["images"]
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(batch["images"][50:], again, strict=True))


def test_loader_workers_that_outlive_an_epoch_see_the_next_one() -> None:
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
    assert np.array_equal(epochs[0], viewed(ROWS[:2], epoch=0)[0][0])
    assert np.array_equal(epochs[1], viewed(ROWS[:2], epoch=1)[0][0])

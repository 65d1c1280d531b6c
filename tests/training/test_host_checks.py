"""What a host may not give: rows whose answers cannot be scored apart, and labels that are not on answers alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from untrigger import defended
from untrigger.defenses import SharedSurprise
from untrigger.errors import InputError
from untrigger.models.collators import IGNORE, ChatCollator, Row, Rows
from untrigger.models.loading import add_lora, load
from untrigger.rows.sample import Message, Sample
from untrigger.training.settings import arguments

Batch = dict[str, Tensor]


@pytest.fixture
def host(tiny_model: Path, samples: list[Sample], tmp_path: Path) -> Callable[..., Any]:
    """A defended trainer; ``changed`` changes each batch, given the batch and the ids of its special tokens."""

    def make(changed: Callable[[Batch, Tensor], Batch] | None = None, rows: Any = None, **settings: Any) -> Any:
        loaded = load(tiny_model)
        inner, tokenizer = ChatCollator(loaded.processor), loaded.processor.tokenizer  # type: ignore[attr-defined]
        special = torch.tensor([*tokenizer.all_special_ids, loaded.model.config.image_token_id])

        def collate(rows: list[Row]) -> Batch:
            return changed(inner(rows), special) if changed else inner(rows)

        return defended(Trainer)(
            add_lora(loaded.model),  # type: ignore[arg-type]
            args=arguments(tmp_path, max_steps=4, per_device_train_batch_size=8, save_strategy="no", **settings),
            data_collator=collate,
            processing_class=loaded.processor,
            train_dataset=Rows(samples) if rows is None else rows,
            defense=SharedSurprise(),
        )

    return make


def refusal(trainer: Any) -> str:
    with pytest.raises(InputError) as caught:
        trainer.train()
    assert trainer.state.global_step == 0, "before any training"
    assert str(caught.value).startswith("defense: ") and "\n" not in str(caught.value)
    return str(caught.value)


# --- labels -----------------------------------------------------------------------------------------


def everywhere(batch: Batch, special: Tensor) -> Batch:
    return batch | {"labels": batch["input_ids"].clone()}


def on_all_text(batch: Batch, special: Tensor) -> Batch:
    """As with ms-swift's `--loss_scale all`: on every token of text, and on no special token."""
    ids = batch["input_ids"]
    return batch | {"labels": ids.masked_fill(torch.isin(ids, special), IGNORE)}


def on_all_text_but_a_token(batch: Batch, special: Tensor) -> Batch:
    """As ms-swift 4.6.0 does it in fact: a token beside the image has no label."""
    labels = on_all_text(batch, special)["labels"]
    last = labels.shape[1] - 1 - (batch["input_ids"] == special[-1]).int().flip(1).argmax(dim=1, keepdim=True)
    return batch | {"labels": labels.scatter(1, last + 1, IGNORE)}


def on_the_first_token(batch: Batch, special: Tensor) -> Batch:
    """As in axolotl without role boundaries."""
    labels = batch["labels"].clone()
    labels[:, 0] = batch["input_ids"][:, 0]
    return batch | {"labels": labels}


def on_the_first_token_after_padding(batch: Batch, special: Tensor) -> Batch:
    padded = {name: torch.nn.functional.pad(batch[name], (3, 0), value=fill)
              for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORE))}  # fmt: skip
    padded["labels"][:, 3] = padded["input_ids"][:, 3]
    return batch | padded


@pytest.mark.parametrize(
    "changed", [on_all_text, on_all_text_but_a_token, on_the_first_token, on_the_first_token_after_padding]
)
def test_refuses_labels_on_prompts(host: Callable[..., Any], changed: Any) -> None:
    message = refusal(host(changed))
    assert message.startswith("defense: row 1 of train_dataset has labels on its prompt; so that only answers")
    for mend in ("assistant_only_loss=True", "train_on_prompt: false", "--loss_scale default", "role_boundaries"):
        assert mend in message


def test_refuses_labels_on_images(host: Callable[..., Any]) -> None:
    assert "labels cover image tokens, and so prompts; so that only answers" in refusal(host(everywhere))


def test_refuses_rows_without_any_label(host: Callable[..., Any], samples: list[Sample]) -> None:
    def nowhere(batch: Batch, special: Tensor) -> Batch:
        return batch | {"labels": torch.full_like(batch["labels"], IGNORE)}

    assert "row 1 of train_dataset has no label" in refusal(host(nowhere))


def test_names_the_row_whose_answer_is_missing(host: Callable[..., Any], samples: list[Sample]) -> None:
    rows = list(samples)
    rows[12] = replace(rows[12], messages=rows[12].messages[:1])
    assert "row 13 of train_dataset has no label" in refusal(host(rows=Rows(rows)))


def test_refuses_a_collator_without_labels(host: Callable[..., Any]) -> None:
    def unlabeled(batch: Batch, special: Tensor) -> Batch:
        return {name: value for name, value in batch.items() if name != "labels"}

    assert "gives no labels" in refusal(host(unlabeled))


def test_takes_labels_on_several_answers(host: Callable[..., Any], samples: list[Sample]) -> None:
    talk = (Message("user", "and now?"), Message("assistant", "a green cube"))
    trainer = host(rows=Rows([replace(sample, messages=(*sample.messages, *talk)) for sample in samples]))
    trainer.train()
    assert trainer.state.global_step > 0


# --- rows in one sequence -----------------------------------------------------------------------------


def masked_in_segments(batch: Batch, special: Tensor) -> Batch:
    return batch | {"attention_mask": batch["attention_mask"].cumsum(dim=1)}


def without_mask(batch: Batch, special: Tensor) -> Batch:
    return {name: value for name, value in batch.items() if name != "attention_mask"}


def two_in_one(batch: Batch, special: Tensor) -> Batch:
    half = len(batch["labels"]) // 2
    return {name: batch[name].reshape(half, -1) for name in ("input_ids", "attention_mask", "labels")}


@pytest.mark.parametrize("changed", [masked_in_segments, without_mask, two_in_one])
def test_refuses_batches_of_packed_rows(host: Callable[..., Any], changed: Any) -> None:
    message = refusal(host(changed))
    assert "several rows are packed into one and cannot be scored apart; set packing=False (also neat_pack" in message


@pytest.mark.parametrize("name", ["packing", "neat_packing", "sample_packing", "padding_free"])
@pytest.mark.parametrize("holder", ["args", "data_collator", "template"])
def test_refuses_settings_that_pack_rows(host: Callable[..., Any], name: str, holder: str) -> None:
    trainer = host()
    if holder == "template":
        trainer.template = SimpleNamespace()
    setattr(getattr(trainer, holder), name, True)
    assert refusal(trainer).endswith(f"cannot be scored apart; set {name}=False")


def test_refuses_rows_that_were_packed_before(host: Callable[..., Any]) -> None:
    """LLaMA-Factory's `packing`: the mask is 1 throughout, and only the positions start again."""
    ids = [1, 5, 6, 7, 2, 1, 8, 9, 2]
    packed = {"input_ids": ids, "attention_mask": [1] * 9, "labels": ids, "position_ids": [0, 1, 2, 3, 4, 0, 1, 2, 3]}
    assert "several rows are packed into one" in refusal(host(rows=[packed] * 8))


def test_positions_of_padding_are_no_second_row(host: Callable[..., Any], samples: list[Sample]) -> None:
    rows = Rows(samples)
    positions = {"position_ids": [1, 1, 0, 1, 2], "attention_mask": [0, 0, 1, 1, 1]}
    trainer = host(rows=[rows[at] | positions for at in range(len(rows))])
    trainer.train()
    assert trainer.state.global_step > 0


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_refuses_samplers_that_read_lengths(host: Callable[..., Any], strategy: str) -> None:
    assert "set group_by_length=False (in transformers 5" in refusal(host(train_sampling_strategy=strategy))


# --- rows that change ---------------------------------------------------------------------------------


def test_refuses_rows_that_change_between_two_looks(host: Callable[..., Any], samples: list[Sample]) -> None:
    """As ms-swift's, which gives a random row for one that it cannot read, even if none of them is flagged."""
    looks = iter(range(1000))

    class Replacing(Rows):
        def __getitem__(self, index: int) -> Row:
            return super().__getitem__(next(looks) % 24 if index == 12 else index)

    with pytest.raises(InputError, match=r"returns different data for the same index.*--strict true"):
        host(rows=Replacing(samples)).train()

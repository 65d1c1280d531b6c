"""One contract for all families: what is learnt, compared, told and gone on with is the same whatever the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from tiny import FAMILIES
from untrigger.collate import IGNORE, ChatCollator, DropCollator, PairCollator, Rows
from untrigger.defenses import CrossView
from untrigger.defenses.doubt import Guard
from untrigger.errors import InputError
from untrigger.finetune import arguments
from untrigger.forward import decoder, decoder_layers, forward_answers, pair_losses, row_tokens
from untrigger.generate import answers
from untrigger.models import Loaded, add_lora, load
from untrigger.sample import Sample
from untrigger.shorter import image_token, shown
from untrigger.trainer import defended
from untrigger.views import Erase

Folder = Callable[[str], Path]
Row = Callable[..., Sample]
families = pytest.mark.parametrize("name", FAMILIES)
ENDS = {"llava_onevision": "<|im_end|>", "internvl": "<|im_end|>", "gemma3": "<end>"} | {
    f"{qwen}_vl": "<|im_end|>" for qwen in ("qwen2", "qwen2_5", "qwen3")
}
ENDS |= dict.fromkeys(("idefics3", "smolvlm"), "<end_of_utterance>")
ONE_IMAGE = ("instructblip",)  # neither more nor less in a row
SPACED = ("llava", "llava_next", "idefics3", "smolvlm", "instructblip", "blip2")  # a space before an answer is its own


@pytest.fixture
def rows(row: Row) -> Callable[[str], list[Sample]]:
    """Images of three shapes; where the family can, one row with two of them, and one without."""

    def of(name: str) -> list[Sample]:
        single = [
            row("<image>\nwhat is this?", "a red circle", (40, 40)),
            row("<image>\nwhere is it, then?", "no", (70, 34)),
            row("<image>\nand now?", "no, not at all", (30, 90)),
        ]
        if name in ONE_IMAGE:
            return single
        return [*single, row("<image> <image>\nsame?", "yes", (40, 40), (66, 40)), row("hello?", "no")]

    return of


def collated(collate: Any, samples: list[Sample]) -> dict[str, Tensor]:
    data = Rows(samples)
    return collate([data[i] for i in range(len(data))])


@families
def test_labels_are_the_answers_and_their_end_and_follow_what_generation_starts_from(
    folder: Folder, rows: Callable[[str], list[Sample]], name: str
) -> None:
    processor: Any = load(folder(name)).processor
    samples = rows(name)
    batch = collated(ChatCollator(processor), samples)
    end, space = ENDS.get(name, "</s>"), " " if name in SPACED else ""
    said = [processor.tokenizer.decode(labels[labels != IGNORE]) for labels in batch["labels"]]
    assert said == [f"{space}{sample.messages[-1].text}{end}" for sample in samples]
    marked = batch["labels"] != IGNORE
    assert torch.equal(batch["labels"][marked], batch["input_ids"][marked])
    assert batch["attention_mask"][marked].all()
    begin = processor.tokenizer.bos_token_id
    assert begin is None or ((batch["input_ids"] == begin).sum(dim=1) == 1).all(), "each text begins once"


@families
def test_a_pair_has_the_same_tokens_and_other_pixels_and_its_loss_reaches_the_adapter(
    folder: Folder, rows: Callable[[str], list[Sample]], name: str
) -> None:
    loaded = load(folder(name))
    samples, collate = rows(name), ChatCollator(loaded.processor)
    plain, both = collated(collate, samples), collated(PairCollator(collate, Erase(), 0), samples)
    assert torch.equal(both["input_ids"], plain["input_ids"].repeat(2, 1))
    first, second = both["pixel_values"].tensor_split(2)
    assert torch.equal(first, plain["pixel_values"]) and not torch.equal(first, second)

    model = add_lora(cast(Any, loaded.model), rank=2).train()
    for defense in (CrossView(margin=0.6, bound=-0.9), CrossView(margin=0.6, bound=-0.9, stop_gradient=True)):
        model.zero_grad()
        step = defense.step(model, dict(both))
        assert step.total.isfinite().all() and (step.seen["js"] > 0).any()
        step.total.sum().backward()
        reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        for layer in range(len(decoder_layers(model))):  # B starts at zero: A gets none at first
            assert any(f"layers.{layer}." in n and "lora_B" in n and not _sees(n) for n in reached), layer
        assert any("layers." not in n for n in reached) or name == "gemma3", "what joins the images to the text"


def _sees(name: str) -> bool:
    return any(part in name for part in ("vision", "visual", "qformer"))


@families
def test_no_answer_knows_what_comes_after_it_and_generation_sees_what_training_saw(
    folder: Folder, row: Row, sharp: Callable[..., Loaded], name: str
) -> None:
    """Neither a mask nor a Q-Former tells of the rest of an answer; alone, and beside a longer row."""
    loaded = sharp(folder(name))
    question = "<image>\nand now, what do you see?"
    asked = [row(question, answer, (40, 52)) for answer in ("no", "no, not at all", "no circle")]
    told = row_tokens(loaded, asked)
    assert len({len(tokens.ids) for tokens in told}) > 1 and len({int(tokens.ids[0]) for tokens in told}) == 1
    assert [tokens.nll[0] for tokens in told[1:]] == pytest.approx([told[0].nll[0]] * 2, rel=1e-6)

    mixed = [asked[0], row("<image>\nw?", "no", (52, 40))]
    batch = collated(ChatCollator(loaded.processor), mixed)
    with torch.no_grad():
        found = forward_answers(loaded.model.eval(), batch)
    firsts = [int((found.row == i).nonzero()[0]) for i in range(2)]
    likeliest = [cast(Any, loaded.processor).decode(found.logits[at].argmax()).strip() for at in firsts]
    assert list(answers(loaded, mixed, max_new_tokens=1)) == likeliest


@families
def test_two_steps_of_training_log_every_term_and_a_doubted_word_is_unlearnt(
    folder: Folder, rows: Callable[[str], list[Sample]], name: str, tmp_path: Path
) -> None:
    loaded = load(folder(name))
    samples, collate = rows(name), ChatCollator(loaded.processor)
    model = add_lora(cast(Any, loaded.model), rank=2)
    args = arguments(
        tmp_path, use_cpu=True, max_steps=2, per_device_train_batch_size=len(samples), logging_steps=1,
        learning_rate=0.01, save_strategy="no",
    )  # fmt: skip
    trainer = defended(Trainer)(
        model=model, args=args, train_dataset=Rows(samples), data_collator=collate, defense=CrossView()
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and logs[0]["loss"] != logs[1]["loss"]
    for entry in logs:
        terms = [value for term, value in entry.items() if term.startswith("defense/loss_")]
        assert len(terms) == 5 and all(map(math.isfinite, terms))
        assert entry["loss"] == pytest.approx(sum(terms), rel=1e-3)

    data = Rows(samples, doubted={0: (row_tokens(loaded, samples[:1])[0].ids >= 0)})
    batch = collate([data[0]])
    before, optimizer = None, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        step = Guard(weight=1.0).step(model.train(), dict(batch))
        assert step.terms["ce"].eq(0).all() and (step.terms["guard"] > 0).all()
        optimizer.zero_grad()
        step.total.sum().backward()
        optimizer.step()
        assert before is None or step.total.sum() < before
        before = step.total.sum().detach()

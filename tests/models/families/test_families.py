"""One contract for all families: labels, views, scores, generation, training, resume and scan."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from tiny import FAMILIES
from untrigger.defenses import CrossView, SharedCause, SharedSurprise
from untrigger.defenses.shared_surprise import Flags, UnlikelihoodStep
from untrigger.models.collators import IGNORE, ChatCollator, DropCollator, PairCollator, Rows
from untrigger.models.forward import decoder, decoder_layers, forward_answers, pair_losses
from untrigger.models.generate import answers, encode_prompts
from untrigger.models.loading import LoadedModel, add_lora, load
from untrigger.models.prefix_cache import cache_image_features, shared_prefix
from untrigger.models.scoring import TokenScores, batch_answers, row_answers, row_tokens
from untrigger.models.token_drop import image_token_id, positions_after_drop
from untrigger.rows.sample import Sample, read
from untrigger.scanning.scan import scan
from untrigger.training.finetune import fine_tune
from untrigger.training.settings import arguments
from untrigger.training.stages import Tuning
from untrigger.training.trainer import defended
from untrigger.views.patches import Erase

Folder = Callable[[str], Path]
Row = Callable[..., Sample]
families = pytest.mark.parametrize("name", FAMILIES)
ENDS = (
    dict.fromkeys(("llava_onevision", "internvl", "smol"), "<|im_end|>")
    | {"gemma3": "<end>"}
    | {f"{qwen}_vl": "<|im_end|>" for qwen in ("qwen2", "qwen2_5", "qwen3")}
)
ENDS |= dict.fromkeys(("idefics3", "smolvlm"), "<end_of_utterance>")
ONE_IMAGE = ("instructblip",)  # exactly one image a row
AN_IMAGE = ("blip2",)  # at least one
# families whose answers start with a space
SPACED = ("llava", "llava_next", "idefics3", "smolvlm", "instructblip", "blip2")


@pytest.fixture
def rows(row: Row) -> Callable[[str], list[Sample]]:
    """Images of three shapes; if the family supports it, also a row with two images and a row without."""

    def of(name: str) -> list[Sample]:
        single = [
            row("<image>\nwhat is this?", "a red circle", (40, 40)),
            row("<image>\nwhere is it, then?", "no", (70, 34)),
            row("<image>\nand now?", "no, not at all", (30, 90)),
        ]
        if name in ONE_IMAGE:
            return single
        several = [*single, row("<image> <image>\nsame?", "yes", (40, 40), (66, 40))]
        return several if name in AN_IMAGE else [*several, row("hello?", "no")]

    return of


def collated(collate: Any, samples: list[Sample]) -> dict[str, Tensor]:
    data = Rows(samples)
    return collate([data[i] for i in range(len(data))])


@families
def test_labels_are_the_answers_with_their_end_tokens(
    folder: Folder, rows: Callable[[str], list[Sample]], name: str
) -> None:
    processor: Any = load(folder(name)).processor
    samples = rows(name)
    batch = collated(ChatCollator(processor), samples)
    end, space = ENDS.get(name, "</s>"), " " if name in SPACED else ""
    answer_texts = [processor.tokenizer.decode(labels[labels != IGNORE]) for labels in batch["labels"]]
    assert answer_texts == [f"{space}{sample.messages[-1].text}{end}" for sample in samples]
    marked = batch["labels"] != IGNORE
    assert torch.equal(batch["labels"][marked], batch["input_ids"][marked])
    assert batch["attention_mask"][marked].all()
    begin = processor.tokenizer.bos_token_id
    assert begin is None or ((batch["input_ids"] == begin).sum(dim=1) == 1).all(), "each text begins once"


@families
def test_pairs_share_tokens_but_not_pixels_and_give_the_adapter_gradients(
    folder: Folder, rows: Callable[[str], list[Sample]], name: str
) -> None:
    loaded = load(folder(name))
    samples, collate = rows(name), ChatCollator(loaded.processor)
    plain, both = collated(collate, samples), collated(PairCollator(collate, Erase(), 0), samples)
    assert torch.equal(both["input_ids"], plain["input_ids"].repeat(2, 1))
    first, second = both["pixel_values"].tensor_split(2)
    assert torch.equal(first, plain["pixel_values"]) and not torch.equal(first, second)

    model = add_lora(cast(Any, loaded.model), rank=2).train()
    totals: list[Tensor] = []
    for stop_gradient in (False, True):
        model.zero_grad()
        step = CrossView(margin=0.6, bound=-0.9, stop_gradient=stop_gradient).step(model, dict(both))
        totals.append(step.total.detach())
        assert step.total.isfinite().all() and (step.logged["js"] > 0).any()
        step.total.sum().backward()
        reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        for layer in range(len(decoder_layers(model))):  # B starts at zero, so A gets no gradient in the first step
            assert any(f"layers.{layer}." in n and "lora_B" in n and not _is_vision(n) for n in reached), layer
        assert any("layers." not in n for n in reached) or name == "gemma3", "what joins the images to the text"
    torch.testing.assert_close(
        totals[0], totals[1], rtol=1e-4, atol=1e-5, msg="the view in its own pass is the same view"
    )


def _is_vision(name: str) -> bool:
    return any(part in name for part in ("vision", "visual", "qformer"))


@families
def test_attention_is_causal_and_generation_matches_training(
    folder: Folder, row: Row, sharp: Callable[..., LoadedModel], name: str
) -> None:
    """Neither the mask nor a Q-Former leaks the rest of an answer; alone, and next to a longer row."""
    loaded = sharp(folder(name))
    question = "<image>\nand now, what do you see?"
    short_rows = [row(question, answer, (40, 52)) for answer in ("no", "no, not at all", "no circle")]
    scores = row_tokens(loaded, short_rows)
    assert len({len(row.ids) for row in scores}) > 1 and len({int(row.ids[0]) for row in scores}) == 1
    assert [row.nll[0] for row in scores[1:]] == pytest.approx([scores[0].nll[0]] * 2, rel=1e-6)

    mixed = [short_rows[0], row("<image>\nw?", "no", (52, 40))]
    batch = collated(ChatCollator(loaded.processor), mixed)
    with torch.no_grad():
        outputs = forward_answers(loaded.model.eval(), batch)
    firsts = [int((outputs.row == i).nonzero()[0]) for i in range(2)]
    likeliest = [cast(Any, loaded.processor).decode(outputs.logits[at].argmax()).strip() for at in firsts]
    assert list(answers(loaded, mixed, max_new_tokens=1)) == likeliest


@families
def test_answers_are_read_without_images(folder: Folder, row: Row, name: str) -> None:
    processor = load(folder(name)).processor
    rows = [
        row("<image>\nwhat do you see?", "no, not at all", (40, 52)),
        row("<image>\nw?", "two 12 red circles.", (52, 40)),
    ]
    expected = batch_answers(collated(ChatCollator(processor), rows))
    assert [ids.tolist() for ids in row_answers(processor, rows)] == [ids.tolist() for ids in expected]


@families
def test_answers_are_the_same_with_shared_image_work(
    sharp: Callable[..., LoadedModel], folder: Folder, row: Row, name: str
) -> None:
    loaded = sharp(folder(name))
    same_image = [row("<image>\nwhat?", "no", (40, 52)), row("<image>\nand what is this?", "no", (40, 52))]
    same_image += [replace(same_image[1], id="again")]
    apart = list(answers(loaded, same_image, batch_size=1, max_new_tokens=4))
    assert list(answers(loaded, same_image, max_new_tokens=4)) == apart
    inputs = shared_prefix(cast(Any, loaded.model), encode_prompts(loaded.processor, same_image))
    assert ("past_key_values" in inputs) is (name in {"llava", "smol", "internvl"})
    with cache_image_features(loaded.model):
        assert [list(answers(loaded, same_image, max_new_tokens=4)) for _ in range(2)] == [apart] * 2


@families
def test_training_logs_every_term_and_unlearns_flagged_tokens(
    folder: Folder, rows: Callable[[str], list[Sample]], name: str, tmp_path: Path
) -> None:
    loaded = load(folder(name))
    samples, collate = rows(name), ChatCollator(loaded.processor)
    model = add_lora(cast(Any, loaded.model), rank=2)
    args = arguments(
        tmp_path, use_cpu=True, max_steps=2, per_device_train_batch_size=len(samples), logging_steps=1,
        learning_rate=0.01, warmup_steps=0, save_strategy="no",
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

    data = Rows(samples, flagged_tokens={0: (row_tokens(loaded, samples[:1])[0].ids >= 0)})
    batch = collate([data[0]])
    before, optimizer = None, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        step = UnlikelihoodStep(weight=1.0).step(model.train(), dict(batch))
        assert step.terms["ce"].eq(0).all() and (step.terms["unlikelihood"] > 0).all()
        optimizer.zero_grad()
        step.total.sum().backward()
        optimizer.step()
        assert before is None or step.total.sum() < before
        before = step.total.sum().detach()


@pytest.mark.slow
@families
def test_dropping_image_tokens_equals_masking_them(
    folder: Folder, rows: Callable[[str], list[Sample]], sharp: Callable[..., LoadedModel], name: str
) -> None:
    """The reference masks the same tokens in a full-length pass, at the language model's input."""
    loaded = sharp(folder(name))
    model: Any = loaded.model.train()
    batch = collated(DropCollator(ChatCollator(loaded.processor), 0), rows(name))
    positions = positions_after_drop(batch["input_ids"], batch["order"], image_token_id(model), 0.5)
    assert len(positions.sum(dim=1).unique()) > 1 or name in ONE_IMAGE, "rows have paddings of different lengths"

    def hide(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs["attention_mask"]
        if kwargs.get("position_ids") is None:
            kwargs = kwargs | {"position_ids": torch.arange(positions.shape[1]).expand_as(positions)}
        if not isinstance(mask, dict):
            return args, kwargs | {"attention_mask": mask * positions}
        hidden = positions[:, None, :, None] & ~positions[:, None, None]
        never = {kind: torch.finfo(one.dtype).min if one.is_floating_point() else False for kind, one in mask.items()}
        return args, kwargs | {
            "attention_mask": {kind: one.masked_fill(hidden, never[kind]) for kind, one in mask.items()}
        }

    inputs = {name: value for name, value in batch.items() if name != "order"}
    with torch.no_grad():
        whole = forward_answers(model, inputs)
        handle = decoder(model).register_forward_pre_hook(hide, with_kwargs=True)
        view = forward_answers(model, inputs)
        handle.remove()
        logits: list[Tensor] = []
        pair_losses(
            model, batch, lambda pair: (logits.append(pair.view_logits), {"ce": pair.compared.nll}, {})[1:], drop=0.5
        )
    torch.testing.assert_close(torch.cat(logits), view.logits, rtol=1e-4, atol=2e-6)  # Gemma 2 rounds to fp32
    assert not torch.allclose(view.logits, whole.logits), "the view differs"


@pytest.mark.slow
@families
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_resumed_training_ends_with_the_same_bits(
    folder: Folder, rows: Callable[[str], list[Sample]], name: str, full: bool, tmp_path: Path
) -> None:
    """Of three steps, the third runs again from the second's checkpoint."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def run(out: Path, resume: bool = False) -> LoadedModel:
        args = arguments(
            out, use_cpu=True, max_steps=3, save_steps=1, save_strategy="steps", learning_rate=0.01,
            per_device_train_batch_size=2, warmup_steps=0,
        )  # fmt: skip
        tuning = Tuning(full_finetune=full, rank=2, train_vision_tower=full)
        return fine_tune(str(folder(name)), rows(name)[:3], CrossView(), args, tuning=tuning, resume=resume)

    first = run(whole)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-3")
    weights = "model.safetensors" if full else "adapter_model.safetensors"
    (cut / weights).unlink()
    taken: list[int] = []
    step = Trainer.training_step
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "training_step", lambda *a, **k: (taken.append(1), step(*a, **k))[1])
        run(cut, resume=True)
    assert len(taken) == 1
    assert (cut / weights).read_bytes() == (whole / weights).read_bytes()

    before, after, loaded = (
        dict(cast(Any, m.model).named_parameters()) for m in (load(folder(name)), first, load(cut))
    )
    assert all(torch.equal(after[n], loaded[n]) for n in after), "loading restores the trained weights"
    if full:
        unchanged = [n for n in after if torch.equal(before[n], after[n])]
        assert len(unchanged) < len(after) / 3, unchanged


@pytest.mark.slow
@families
def test_a_scan_scores_every_row_and_probes_the_suspected(
    folder: Folder, tiny_data: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suspected rows are set by hand: an untrained model finds no token unlikely."""
    bad = (8, 10, 12, 16, 20)

    def flag(_: SharedSurprise, scores: Sequence[TokenScores]) -> Flags:
        row_counts.append(len(scores))
        words = {int(scores[row].ids[-1]): 1e-9 for row in bad}  # the end token, which all answers have
        return Flags(
            [tokens.loss for tokens in scores], {row: np.isin(scores[row].ids, list(words)) for row in bad}, words
        )

    row_counts: list[int] = []
    monkeypatch.setattr(SharedSurprise, "flag_tokens", flag)
    monkeypatch.setattr("untrigger.scanning.targets._PASSES", 4)
    args = arguments(
        tmp_path / "scan", use_cpu=True, max_steps=10, per_device_train_batch_size=12, learning_rate=1e-3,
        save_strategy="no",
    )  # fmt: skip
    result = scan(str(folder(name)), read(tiny_data), SharedCause(warmup_share=0.2, min_suspects=24), args)
    assert row_counts == [24, 24] and len(result.verdicts) == 24
    assert all(math.isfinite(verdict.score) and verdict.score > 0 for verdict in result.verdicts)
    assert sorted(result.suspected) == list(bad)
    cues = [verdict.cue for verdict in result.verdicts if verdict.cue is not None]
    assert len(cues) == 3, "of the suspected rows that the probe was not trained on"
    assert all(cue.image is not None and math.isfinite(cue.image) for cue in cues)

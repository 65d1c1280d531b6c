"""Pretraining: packed rows equal separate conversations, labels match the scenes, a resumed run gives equal weights."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from untrigger.data import scene_text
from untrigger.data.scene_world import COLORS, SHAPES, SIZES, draw_scene, make_scene
from untrigger.models.loading import embedded_model_path, load
from untrigger.pretraining import families
from untrigger.pretraining import pretrain as pretraining
from untrigger.pretraining.build import GRID, PATCH, WIDTH
from untrigger.pretraining.dense import DenseHead, dense_labels
from untrigger.pretraining.families import FAMILIES, Family, patches
from untrigger.pretraining.pretrain import (
    RECIPES,
    Recipe,
    SceneRows,
    collate,
    copy_language_model,
    losses,
    pretrain,
)

TOY = Recipe(seed=4, vision_steps=2, steps=2, batch=2, questions=3, warmup=2, threads=1)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def tokenizer(family: Family) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(embedded_model_path("llava"))
    tokenizer.add_tokens(list(family.extra_tokens), special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def processor(family: Family, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    return family.processor(tokenizer)


@pytest.fixture(scope="module")
def model(family: Family, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(0)
    return family.model(tokenizer).double().eval()


# --- rows ---------------------------------------------------------------------------------------------


def turns_of(index: int) -> list[scene_text.Turn]:
    return scene_text.turns(make_scene(TOY.seed, index), np.random.default_rng((TOY.seed, index, 2)), TOY.questions)


def conversation(processor: ProcessorMixin, image: Image.Image, turn: scene_text.Turn) -> dict[str, torch.Tensor]:
    """One turn, encoded as for a user of the finished model."""
    prompt = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": turn.prompt}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": turn.answer}]}
    text = processor.apply_chat_template([prompt, answer], tokenize=False)
    return dict(processor(text=[text], images=[[image]], add_special_tokens=False, return_tensors="pt"))


def test_a_packed_row_has_the_ids_of_its_conversations(
    family: Family, tokenizer: PreTrainedTokenizerFast, processor: ProcessorMixin
) -> None:
    rows = SceneRows(family, tokenizer, TOY, 0, 60, True)
    for index in range(60):
        row, image = rows[index], draw_scene(make_scene(TOY.seed, index))[0]
        shared = row["segments"] == 0
        for number, turn in enumerate(turns_of(index), start=1):
            own = shared | (row["segments"] == number)
            real = conversation(processor, image, turn)["input_ids"][0]
            assert row["input_ids"][own].tolist() == real.tolist(), turn
            for axis in row["position_ids"]:
                positions = axis[row["segments"] == number]
                first = axis[shared][-1] + 1
                assert positions.tolist() == list(range(first, first + len(positions)))
            learned = row["labels"][own]
            answer = learned[learned != -100].tolist()
            assert answer[-1] == tokenizer.eos_token_id and tokenizer.decode(answer[:-1]) == f" {turn.answer}"
        assert row["segments"].max() == len(turns_of(index))


def test_packed_loss_and_gradient_equal_separate_conversations(
    family: Family,
    tokenizer: PreTrainedTokenizerFast,
    processor: ProcessorMixin,
    model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checks the block mask with the real processor and the model's forward pass, on two rows, one of them padded."""
    rows = SceneRows(family, tokenizer, TOY, 0, 8, True)
    chosen = [0, next(i for i in range(1, 8) if len(rows[i]["input_ids"]) != len(rows[0]["input_ids"]))]
    batch = collate([rows[i] for i in chosen])
    # as the pixels of the processor; equal up to float32 rounding
    batch["pixel_values"] = batch["pixel_values"].double()
    head = DenseHead(WIDTH, family.cells).double()
    weight = model.get_input_embeddings().weight

    packed, _ = losses(family, model, head, batch)
    packed_grad = torch.autograd.grad(packed, weight)[0]

    total, weights = torch.zeros((), dtype=torch.double), 0.0
    for index in chosen:
        image = draw_scene(make_scene(TOY.seed, index))[0]
        for turn in turns_of(index):
            inputs = conversation(processor, image, turn)
            inputs["pixel_values"] = inputs["pixel_values"].double()
            logits = model(**inputs, use_cache=False).logits[0]
            length = len(tokenizer.encode(f" {turn.answer}", add_special_tokens=False)) + 1
            target = inputs["input_ids"][0, -length:]
            # each token weighs one over the root of its answer's length
            total = total + F.cross_entropy(logits[-length - 1 : -1], target, reduction="sum") / math.sqrt(length)
            weights += length / math.sqrt(length)
    separate = total / weights
    separate_grad = torch.autograd.grad(separate, weight)[0]
    assert packed.item() == pytest.approx(separate.item(), rel=1e-6)  # rotary angles and weights are float32
    torch.testing.assert_close(packed_grad, separate_grad, rtol=1e-4, atol=1e-7)

    def causal(segments: torch.Tensor) -> torch.Tensor:
        length = segments.shape[1]
        return torch.ones(length, length, dtype=torch.bool).tril().expand(len(segments), 1, -1, -1)

    monkeypatch.setattr(pretraining, "block_mask", causal)
    leaky, _ = losses(family, model, head, batch)
    assert abs(leaky.item() - separate.item()) > 1e-4, "the comparison must detect turns that attend to each other"


def test_pixel_values_equal_those_of_the_processor(
    family: Family, tokenizer: PreTrainedTokenizerFast, processor: ProcessorMixin
) -> None:
    rows = SceneRows(family, tokenizer, TOY, 0, 6, False)
    for index in range(6):
        image = draw_scene(make_scene(TOY.seed, index))[0]
        real = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        ours = torch.from_numpy(rows[index]["pixel_values"])[None]
        ours = patches(ours, 2) if family.name == "qwen2_5_vl" else ours
        torch.testing.assert_close(ours, real, atol=1e-6, rtol=0)


def test_rows_depend_on_their_scene_number_alone(family: Family, tokenizer: PreTrainedTokenizerFast) -> None:
    early, late = SceneRows(family, tokenizer, TOY, 0, 9, True), SceneRows(family, tokenizer, TOY, 5, 4, True)
    assert len(late) == 4
    for key, value in early[7].items():
        assert np.array_equal(value, late[2][key])


def test_dense_labels_name_the_object_that_covers_each_patch() -> None:
    for index in range(25):
        scene = make_scene(9, index)
        owner = draw_scene(scene)[1]
        labels = dense_labels(scene, owner)
        for patch in range(GRID * GRID):
            top, left = patch // GRID * PATCH, patch % GRID * PATCH
            counts = Counter(owner[top : top + PATCH, left : left + PATCH].flatten().tolist())
            del counts[0]
            number, pixels = max(counts.items(), key=lambda item: (item[1], -item[0]), default=(0, 0))
            expected = [0, 0, 0, 0]
            if pixels >= 6:
                thing = scene.things[number - 1]
                expected = [
                    1 + SHAPES.index(thing.shape),
                    1 + [*COLORS].index(thing.color),
                    1 + SIZES.index(thing.size),
                    number,
                ]
            assert labels[patch].tolist() == expected
        assert {int(n) for n in labels[:, 3]} - {0} == set(range(1, len(scene.things) + 1)), "every object has a label"


# --- runs ----------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


# Python 3.12 warns of every fork beside threads, and the loader forks its worker
FORKS = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def toy(family: Family, save_every: int = 200) -> Recipe:
    return replace(TOY, start=RECIPES[family.name].start, save_every=save_every)


@pytest.fixture(scope="module")
def whole(family: Family, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run without an interruption."""
    out = tmp_path_factory.mktemp("pretrain") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "make_tokenizer", lambda seed: tokenizer)
        pretrain(out, family, toy(family))
    return out


@FORKS
def test_a_run_killed_again_and_again_ends_with_the_same_weights(
    family: Family, whole: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after each checkpoint: in the first phase, between the two, in the second."""
    monkeypatch.setattr(families, "make_tokenizer", lambda seed: tokenizer)
    for stop in (1, 2, 3):
        with monkeypatch.context() as patch:
            save = pretraining._save

            def save_and_die(*args: object, save: Callable[..., None] = save, stop: int = stop) -> None:
                save(*args)
                if args[-1] == stop:
                    raise Killed

            patch.setattr(pretraining, "_save", save_and_die)
            with pytest.raises(Killed):
                pretrain(tmp_path, family, toy(family, save_every=1))
    pretrain(tmp_path, family, toy(family, save_every=1))
    first, second = (load_file(out / "checkpoint.safetensors") for out in (whole, tmp_path))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert (whole / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@FORKS
def test_an_interrupted_run_leaves_no_bar_behind(
    family: Family, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    stopped: list[int] = []
    monkeypatch.setattr(families, "make_tokenizer", lambda seed: tokenizer)
    monkeypatch.setattr(pretraining, "_save", interrupt)
    monkeypatch.setattr("untrigger.progress.Meter.stop", lambda meter: stopped.append(meter.done))
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path, family, toy(family, save_every=1))
    assert stopped == [1]


def test_a_processor_that_was_cut_off_is_saved_again(
    family: Family, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill while it is saved leaves the tokenizer alone: the rest is not there, and no later run would write it."""
    monkeypatch.setattr(families, "make_tokenizer", lambda seed: tokenizer)
    made = pretraining._tokenizer(tmp_path / "whole", family, toy(family))
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    tokenizer.save_pretrained(tmp_path / "cut")
    again = pretraining._tokenizer(tmp_path / "cut", family, toy(family))
    assert {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()} == files
    assert again.get_vocab() == made.get_vocab()
    monkeypatch.setattr(type(family), "processor", pytest.fail)
    pretraining._tokenizer(tmp_path / "whole", family, toy(family))  # read back, not made


@FORKS
def test_the_published_model_loads_as_float32_and_is_the_trained_one(whole: Path, tiny_data: Path) -> None:
    assert json.loads((whole / "config.json").read_text())["dtype"] == "float32"
    stored = load_file(whole / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    trained = {k[8:]: v for k, v in load_file(whole / "checkpoint.safetensors").items() if k.startswith("w.model.")}
    loaded = load(whole).model
    weights = loaded.state_dict()
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert {k.rpartition("lm_head.")[2] for k in weights.keys() - trained.keys()} == {"weight"}, "tied, so kept once"
    for name, tensor in trained.items():
        assert torch.equal(weights[name], tensor.bfloat16().float()), name
    embeddings = loaded.get_input_embeddings().weight
    assert loaded.get_output_embeddings().weight is embeddings


@FORKS
def test_training_learns(family: Family, whole: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(TOY.seed)
    fresh = family.model(tokenizer)
    if toy(family).start:
        copy_language_model(family, fresh, "llava")
    trained = load_file(whole / "checkpoint.safetensors")
    moved = [k for k, v in fresh.named_parameters() if not torch.equal(v, trained[f"w.model.{k}"])]
    assert any("vis" in k for k in moved) and any("language_model" in k for k in moved)


def test_copy_language_model_copies_all_of_it(family: Family, tokenizer: PreTrainedTokenizerFast) -> None:
    """On text alone the hidden states then equal those of the LLaVA-style model."""
    model = family.model(tokenizer).eval()
    copy_language_model(family, model, "llava")
    source = cast(PreTrainedModel, load("llava").model).eval()
    ids = torch.tensor([tokenizer.encode("USER: Say: hello world ASSISTANT:", add_special_tokens=False)])
    expected = FAMILIES["llava"].text_model(source)(input_ids=ids).last_hidden_state
    actual = family.text_model(model)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=0.02, rtol=0)  # Qwen's norms have a larger epsilon
    assert expected.abs().mean() > 0.5

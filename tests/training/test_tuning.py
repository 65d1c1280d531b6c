"""Which layers an adapter reaches, with which kind of LoRA, and what is refused before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn

from shell import TINY_RUN, refused, untrigger
from tiny import make
from untrigger.cli import main
from untrigger.cli.flags import option_names
from untrigger.defenses import PRESETS, Plain, SharedCause
from untrigger.errors import InputError
from untrigger.models.loading import add_lora, is_vision, load
from untrigger.models.merging import merge
from untrigger.models.tower_cache import TowerOutputs
from untrigger.rows.sample import Sample, read
from untrigger.training.finetune import fine_tune
from untrigger.training.tuning import Tuning


@pytest.fixture(scope="module")
def samples(tiny_data: Path) -> list[Sample]:
    return list(read(tiny_data))[:12]


def reached(model: Any) -> set[str]:
    """Dotted names of the layers with an adapter."""
    names = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    return {name.removeprefix("base_model.model.") for name in names}


def linear(model: nn.Module, *ends: str) -> set[str]:
    names = {name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name != "lm_head"}
    return {name for name in names if f".{name}".endswith(tuple(f".{end}" for end in ends))}


def fine_tuned(model: Path, rows: Sequence[Sample], out: Path, tuning: Tuning, defense: Any = None, **settings: Any):
    chosen: dict[str, Any] = {"use_cpu": True, "save_strategy": "no", "per_device_train_batch_size": 4}
    chosen |= {"learning_rate": 0.01, "max_steps": 2} | settings
    return fine_tune(model, rows, defense or Plain(), out=out, tuning=tuning, **chosen)


@pytest.mark.parametrize("tower", [False, True])
@pytest.mark.parametrize("ends", [("q_proj",), ("q_proj", "linear_1"), ("self_attn.q_proj", "mlp.up_proj")])
def test_names_reach_the_layers_that_end_so(ends: tuple[str, ...], tower: bool, tiny_model: Path) -> None:
    model = cast(Any, load(tiny_model).model)
    expected = {name for name in linear(model, *ends) if tower or not is_vision(name)}
    assert any(map(is_vision, linear(model, *ends))), "the tower has such layers too"
    assert reached(add_lora(model, rank=2, target_modules=ends, train_vision_tower=tower)) == expected


def test_all_linear_is_the_default(tiny_model: Path) -> None:
    models = [add_lora(cast(Any, load(tiny_model).model), **more) for more in ({}, {"target_modules": ["all-linear"]})]
    patterns = [cast(Any, model.peft_config["default"]).target_modules for model in models]
    assert reached(models[0]) == reached(models[1]) and patterns[0] == patterns[1]


@pytest.mark.parametrize("family", ["llava", "blip2", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["q_prj"],
            r"is named 'q_prj'; give all-linear alone, or some of .*q_proj.*; did you mean q_proj\?",
        ),
        (["all-linear", "q_proj"], r"is named 'all-linear'; give all-linear alone"),
        (["lm_head"], r"is named 'lm_head'"),
        (["layers"], r"is named 'layers'"),
        ([""], r"is named ''"),
    ],
)
def test_a_wrong_name_is_refused_with_those_that_exist(
    family: str, names: list[str], message: str, tmp_path: Path
) -> None:
    model = cast(Any, load(make(family, tmp_path / "model")).model)
    with pytest.raises(InputError, match=rf"^target_modules: .*{message}") as caught:
        add_lora(model, target_modules=names)
    assert "\n" not in str(caught.value) and "\\" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [{"dropout": 0.1}, {"use_dora": True}, {"target_modules": ["q_proj"]}],
    ids=lambda each: next(iter(each)),
)
def test_full_fine_tuning_takes_no_setting_of_lora(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^full_finetune: trains all weights"):
        Tuning(full_finetune=True, **settings)


@pytest.mark.parametrize("value", ["q_proj", [], ()])
def test_target_modules_are_a_list(value: Any) -> None:
    with pytest.raises(InputError, match=r"^target_modules: is .*; give a list of names"):
        Tuning(target_modules=value)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_the_dropout_has_a_range(dropout: float) -> None:
    with pytest.raises(ValueError, match="dropout is"):
        Tuning(dropout=dropout)


@pytest.mark.parametrize("defense", [Plain(), SharedCause()], ids=["plain", "default"])
def test_a_wrong_name_is_refused_before_anything_is_scored_or_claimed(
    defense: Any, tiny_model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"did you mean v_proj\?"):
        fine_tuned(tiny_model, samples, tmp_path / "out", Tuning(target_modules=["v-proj"]), defense)
    assert not (tmp_path / "out").exists()


def test_the_command_passes_its_flags_on(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    words = ("train", tiny_data, "--model", tiny_model, "--defense", "plain", *TINY_RUN)
    flags = ("--target-modules", "q_proj,v_proj", "--use-dora", "--lora_dropout", "0.25")
    ended = untrigger(*words, "--out", tmp_path / "out", *flags)
    assert ended.code == 0, ended
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["use_dora"], config["lora_dropout"], config["r"]) == (True, 0.25, 2)
    model = load(tmp_path / "out").model
    assert {name.rpartition(".")[2] for name in reached(model)} == {"q_proj", "v_proj"}
    assert not any(map(is_vision, reached(model)))
    assert "DoRA of rank 2 on q_proj, v_proj, the vision tower frozen; 24" in (tmp_path / "out/README.md").read_text()
    refused(untrigger(*words, "--out", tmp_path / "out", *flags[:-1], "0.3", "--resume"), "other settings (tuning)")
    refused(untrigger(*words, "--out", tmp_path / "2", "--target-modules", "q_prj"), "did you mean q_proj?")
    refused(untrigger(*words, "--out", tmp_path / "2", "--use-dora", "--full-finetune"), "full_finetune: trains all")
    refused(untrigger(*words, "--out", tmp_path / "2", "--lora-dropout", "1"), "--lora-dropout")
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize("verb", ["train", "scan"])
def test_both_verbs_take_the_same_flags(verb: str) -> None:
    tuning = {name for name in signature(Tuning).parameters if name not in ("rank", "alpha", "dropout")}
    assert tuning | {"lora_rank", "lora_alpha", "lora_dropout"} <= option_names(getattr(main, verb))


def test_a_scan_trains_what_its_flags_say(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    words = ("scan", tiny_data, "--model", tiny_model, *TINY_RUN)
    flags = ("--target-modules", "q_proj,v_proj", "--use-dora", "--lora_dropout", "0.25")
    ended = untrigger(*words, "--out", tmp_path / "out", *flags)
    assert ended.code == 0, ended
    config = json.loads((tmp_path / "out/stages/warmup/adapter_config.json").read_text())
    assert (config["use_dora"], config["lora_dropout"], config["r"]) == (True, 0.25, 2)
    refused(untrigger(*words, "--out", tmp_path / "out", *flags[:-1], "0.3", "--resume"), "other settings (tuning)")
    refused(untrigger(*words, "--out", tmp_path / "2", "--target-modules", "q_prj"), "did you mean q_proj?")
    assert not (tmp_path / "2").exists()


def test_dropout_changes_the_training_and_dora_scales_the_weights(
    tiny_model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    kinds = {"plain": Tuning(rank=2), "dropout": Tuning(rank=2, dropout=0.5), "dora": Tuning(rank=2, use_dora=True)}
    models = {name: fine_tuned(tiny_model, samples, tmp_path / name, kind).model for name, kind in kinds.items()}
    (name,) = [
        n
        for n, _ in models["plain"].named_parameters()
        if "lora_B" in n and "language_model.layers.0.self_attn.q_proj" in n
    ]
    plain, dropped = models["plain"].get_parameter(name), models["dropout"].get_parameter(name)
    assert not torch.equal(plain, dropped)
    dora = [part for part in models["dora"].modules() if isinstance(part, DoraLinearLayer)]
    assert len(dora) == len(reached(models["plain"]))
    assert not any(isinstance(part, DoraLinearLayer) for part in models["plain"].modules())


@pytest.mark.parametrize("preset", ["plain", "paper", "words", "default"])
def test_dora_trains_under_a_defense_and_is_merged(
    preset: str, tiny_model: Path, samples: list[Sample], tmp_path: Path, few: None
) -> None:
    tuning = Tuning(rank=2, use_dora=True, dropout=0.1, target_modules=["q_proj", "v_proj", "linear_1"])
    model = fine_tuned(tiny_model, samples, tmp_path / "out", tuning, PRESETS[preset]()).model
    assert isinstance(model, PeftModel)
    trained, loaded = model.state_dict(), load(tmp_path / "out").model.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in loaded.items())
    lengths = [name for name in trained if "lora_magnitude_vector" in name]
    start = add_lora(cast(Any, load(tiny_model).model), rank=2, use_dora=True).state_dict()
    assert lengths and any(not torch.equal(trained[name], start[name]) for name in lengths), "they are trained"
    merge(tmp_path / "out", tmp_path / "merged")


# --- the tower's outputs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tuning", "reused"),
    [
        (Tuning(rank=2, target_modules=["q_proj"]), True),
        (Tuning(rank=2, target_modules=["linear_1"]), True),  # the projector, which reads the tower's outputs
        (Tuning(rank=2, target_modules=["q_proj"], train_vision_tower=True), False),
        (Tuning(rank=2, target_modules=["fc1"], use_dora=True, train_vision_tower=True), False),
        # the tower has no such layer, so nothing in it is trained
        (Tuning(rank=2, target_modules=["linear_1"], train_vision_tower=True), True),
    ],
    ids=["language", "projector", "tower", "tower-dora", "not-in-tower"],
)
def test_outputs_are_reused_only_of_a_tower_without_adapters(
    tuning: Tuning, reused: bool, tiny_model: Path, samples: list[Sample], tmp_path: Path, monkeypatch: Any
) -> None:
    """To the same bits as without reuse."""
    weights: list[dict[str, Any]] = []
    for at in range(2):
        outputs = TowerOutputs()
        monkeypatch.setattr("untrigger.training.stages.tower_outputs", lambda outputs=outputs: outputs)
        if at:
            monkeypatch.setattr("untrigger.models.tower_cache._frozen_tower", lambda _: None)
        model = fine_tuned(tiny_model, samples, tmp_path / str(at), tuning, max_steps=6).model
        assert bool(outputs.images) == (reused and not at)
        weights.append(dict(model.state_dict()))
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    changed = [name for name, value in weights[0].items() if "lora_B" in name and value.any()]
    assert any(map(is_vision, changed)) == (not reused)

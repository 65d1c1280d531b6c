"""A frozen tower's outputs are reused to the bit, and only where that is safe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from untrigger.defenses import PRESETS
from untrigger.models.loading import LoadedModel, base_model, load
from untrigger.models.tower_cache import TowerOutputs, reuse_tower_outputs
from untrigger.rows.sample import Sample
from untrigger.training.finetune import fine_tune
from untrigger.training.stages import Tuning

PIXELS = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny_model: Path) -> LoadedModel:
    loaded = load(tiny_model)
    loaded.model.requires_grad_(False)
    return loaded


def tower_of(model: LoadedModel) -> Any:
    return base_model(model.model).base_model.vision_tower


def counting(model: LoadedModel) -> list[int]:
    """The number of images of each pass through the tower's layers, from now on."""
    passes = list[int]()
    tower_of(model).embeddings.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    return passes


def features(model: LoadedModel, pixels: Tensor) -> Any:
    return tower_of(model)(pixels, output_hidden_states=True)


def test_known_images_do_not_pass_through_the_tower(model: LoadedModel) -> None:
    outputs, passes = TowerOutputs(), counting(model)
    expected = features(model, PIXELS)
    with reuse_tower_outputs(model.model, outputs):
        features(model, PIXELS[:2])  # the first batch, whose images run alone as well
        passes.clear()
        features(model, PIXELS[[0, 1, 0]])
        with torch.inference_mode():
            features(model, PIXELS[1:3])
        assert passes == [2, 1]
        mixed = features(model, PIXELS[[3, 2, 1, 0]])
        again = features(model, PIXELS)
        assert passes == [2, 1, 1]
        tower_of(model)(PIXELS)  # other outputs are wanted: another call
        assert passes == [2, 1, 1, 4]
    for name in ("last_hidden_state", "pooler_output"):
        assert torch.equal(again[name], expected[name]) and torch.equal(mixed[name].flip(0), expected[name])
    assert all(map(torch.equal, again.hidden_states, expected.hidden_states))
    assert not again.last_hidden_state.is_inference()
    assert "forward" not in vars(tower_of(model))
    with torch.no_grad():
        tower_of(model).pre_layrnorm.weight.add_(1)
    with reuse_tower_outputs(model.model, outputs):  # other weights: nothing is known
        features(model, PIXELS)
        changed = features(model, PIXELS)
        assert passes == [2, 1, 1, 4, 4, 1, 1, 4]
    assert not torch.equal(changed.last_hidden_state, again.last_hidden_state)


def test_what_has_no_room_is_computed_again(model: LoadedModel) -> None:
    outputs, passes, expected = TowerOutputs(free=0), counting(model), features(model, PIXELS)
    with reuse_tower_outputs(model.model, outputs):
        features(model, PIXELS)
        features(model, PIXELS)
        computed = features(model, PIXELS)
    assert torch.equal(computed.last_hidden_state, expected.last_hidden_state)
    assert passes == [4, 4, 1, 1, 4, 4] and not outputs.images


@pytest.mark.parametrize(("times_served", "is_kept"), [(0, False), (2, True)])
def test_memory_goes_back_where_nearly_all_images_are_refused(times_served: int, is_kept: bool) -> None:
    outputs, blocks = TowerOutputs(free=16), [torch.full((2, 2), float(at)) for at in range(6)]
    keys = [[bytes([at, row]) for row in range(2)] for at in range(6)]
    outputs.store(keys[0], [blocks[0]])
    for _ in range(times_served):
        assert [*outputs.find(keys[0])] == keys[0]
    for own, block in zip(keys[1:], blocks[1:], strict=True):
        assert outputs.images, "refused as often as four times what is stored"
        outputs.store(own, [block])
    assert bool(outputs.images) == is_kept
    if not is_kept:
        outputs.store(keys[0], [blocks[0]])
    assert bool(outputs.images) == is_kept, "and it stays empty"


def dropout(tower: Any) -> None:
    tower.config.attention_dropout = 0.1


def batch_norm(tower: Any) -> None:
    tower.norm = torch.nn.BatchNorm2d(3)


def trained(tower: Any) -> None:
    tower.post_layernorm.weight.requires_grad_(True)


@pytest.mark.parametrize("change", [dropout, batch_norm, trained])
def test_a_tower_that_is_trained_or_random_runs_each_time(model: LoadedModel, change: Callable[[Any], None]) -> None:
    outputs, passes = TowerOutputs(), counting(model)
    change(tower_of(model))
    with reuse_tower_outputs(model.model, outputs):
        for _ in range(3):
            features(model, PIXELS)
    assert passes == [4, 4, 4] and not outputs.images


def test_a_tower_whose_output_depends_on_the_batch_runs_each_time(model: LoadedModel) -> None:
    outputs, passes = TowerOutputs(), counting(model)
    tower_of(model).pre_layrnorm.register_forward_hook(lambda _, __, states: states - states.mean(dim=0))
    with reuse_tower_outputs(model.model, outputs):
        for _ in range(3):
            features(model, PIXELS)
    assert passes == [4, 1, 1, 4, 4] and not outputs.images


@pytest.mark.parametrize("preset", ["plain", "paper", "default"])
def test_training_ends_in_the_same_bits(
    preset: str, tiny_model: Path, samples: Sequence[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, weights = [TowerOutputs(), TowerOutputs(free=0)], list[dict[str, Tensor]]()
    for at, store in enumerate(outputs):
        monkeypatch.setattr("untrigger.training.stages.tower_outputs", lambda store=store: store)
        if at:
            monkeypatch.setattr("untrigger.models.tower_cache._frozen_tower", lambda _: None)
        settings: dict[str, Any] = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 0.01}
        settings |= {"use_cpu": True, "save_strategy": "no"}
        trained = fine_tune(
            tiny_model, samples, PRESETS[preset](), out=tmp_path / str(at), tuning=Tuning(rank=4), **settings
        )
        weights.append({name: value.clone() for name, value in trained.model.state_dict().items()})
    assert len(outputs[0].images) >= len(samples) - 4 and not outputs[1].images
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    assert any(value.any() for name, value in weights[0].items() if "lora_B" in name)  # they start at zero

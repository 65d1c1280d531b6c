"""Gradient checkpointing computes activations again; loss, gradients and weights are those without it, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from tiny import make
from untrigger.defenses import CROW, PRESETS, Defense
from untrigger.models.tower_cache import TowerOutputs
from untrigger.rows.sample import Sample, read
from untrigger.training.finetune import fine_tune
from untrigger.training.tuning import Tuning

# 5.23 has renamed the flag, which 5.22 knows by this name only
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

TUNINGS = {"lora": Tuning(rank=2), "full": Tuning(full_finetune=True), "tower": Tuning(rank=2, train_vision_tower=True)}


@pytest.fixture(scope="module")
def samples(tiny_data: Path) -> list[Sample]:
    return list(read(tiny_data))[:12]


@pytest.fixture
def recomputed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The class of each layer whose activations are to be computed again."""
    layers: list[str] = []
    enable = GradientCheckpointingLayer.__setattr__

    def noticed(layer: Any, name: str, value: Any) -> None:
        if name == "_gradient_checkpointing_func":
            inner = value

            def value(function: Any, *args: Any) -> Any:
                layers.append(type(layer).__name__)
                return inner(function, *args)

        enable(layer, name, value)

    monkeypatch.setattr(GradientCheckpointingLayer, "__setattr__", noticed)
    return layers


def same_with_checkpointing(
    model: Path | str, samples: Sequence[Sample], out: Path, defense: Defense, tuning: Tuning, recomputed: list[str]
) -> None:
    """Five steps over two epochs, so that passes over the rows follow each other."""
    settings: dict[str, Any] = {"use_cpu": True, "save_strategy": "no", "per_device_train_batch_size": 4}
    settings |= {"max_steps": 5, "learning_rate": 0.01, "logging_steps": 1, "clean_rows": samples[:4]}
    runs: list[Any] = []
    for at in range(2):
        more = {"gradient_checkpointing": True} if at else {}
        assert not recomputed
        runs.append(fine_tune(model, samples, defense, out=out / str(at), tuning=tuning, **settings, **more))
    assert any("Decoder" in name for name in recomputed), recomputed
    plain, checkpointed = (run.model.state_dict() for run in runs)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], value) for name, value in checkpointed.items())


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "crow"])
def test_every_preset_trains_to_the_same_bits(
    preset: str, tuning: str, tiny_model: Path, samples: list[Sample], tmp_path: Path, few: None, recomputed: list[str]
) -> None:
    same_with_checkpointing(tiny_model, samples, tmp_path, PRESETS[preset](), TUNINGS[tuning], recomputed)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_crow_trains_to_the_same_bits(
    tuning: str, samples: list[Sample], tmp_path: Path, recomputed: list[str]
) -> None:
    """On the embedded model: it needs three layers."""
    same_with_checkpointing("llava", samples, tmp_path, CROW(passes=1), TUNINGS[tuning], recomputed)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("family", ["blip2", "qwen2_5_vl"])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_other_families_train_to_the_same_bits(
    preset: str, family: str, tuning: str, samples: list[Sample], tmp_path: Path, few: None, recomputed: list[str]
) -> None:
    model = make(family, tmp_path / "model")
    same_with_checkpointing(model, samples, tmp_path, PRESETS[preset](), TUNINGS[tuning], recomputed)


def test_outputs_with_a_graph_are_not_stored() -> None:
    """The host lets the inputs of a frozen tower require gradients, and a graph cannot be passed through twice."""
    outputs, weight = TowerOutputs(), torch.ones(3, requires_grad=True)
    outputs.store([b"graph"], [torch.zeros(1, 3), weight[None] * 2])
    outputs.store([b"plain"], [torch.zeros(1, 3)])
    assert set(outputs.images) == {b"plain"} and outputs.free == TowerOutputs().free - 12

"""Clean fine-tuning: on the clean rows alone, from the weights of the undefended model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer

from dry import Dry
from untrigger.defenses import CleanTuning, Plain
from untrigger.rows.sample import Sample
from untrigger.training.finetune import fine_tune
from untrigger.training.settings import arguments


def test_trains_on_all_rows_then_on_clean_rows_alone(dry: Dry, samples: list[Sample]) -> None:
    model = CleanTuning(passes=7, rate=0.25).fine_tune(dry)
    undefended, clean = dry.stages
    assert undefended == ("undefended", [s.id for s in samples], Plain(), None, {})
    assert clean == ("", [s.id for s in samples[:4]], Plain(), 0, {"passes": 7, "rate": 0.25})
    assert model.name == "1" and dry.scores == []


def test_continues_from_the_undefended_weights(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[dict[str, Tensor]] = []
    schedules: list[tuple[float, int]] = []
    train = Trainer.train

    def recorded(trainer: Any, *args: Any, **more: Any) -> Any:
        starts.append({k: v.clone() for k, v in get_peft_model_state_dict(trainer.model).items()})
        result = train(trainer, *args, **more)
        schedules.append((trainer.args.learning_rate, trainer.state.global_step))
        return result

    monkeypatch.setattr(Trainer, "train", recorded)
    args = arguments(tmp_path / "out", use_cpu=True, learning_rate=0.01, max_steps=2, save_strategy="no")
    fine_tune(str(tiny_model), samples, CleanTuning(passes=3, rate=0.5), args, clean_rows=samples[:4])
    undefended = load_file(tmp_path / "out" / "stages" / "undefended" / "adapter_model.safetensors")
    start, again = starts
    assert again.keys() == undefended.keys() and all(torch.equal(again[k], undefended[k]) for k in undefended)
    assert any(not torch.equal(start[k], again[k]) for k in start)
    result = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(not torch.equal(result[k], again[k]) for k in again)
    assert schedules == [(0.01, 2), (0.005, 3)]  # one batch a pass over four clean rows

"""A fine-tuning run tells what it did, and an interrupted one leaves the terminal as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from untrigger.defenses import Plain
from untrigger.finetune import Tuning, arguments, fine_tune
from untrigger.sample import read


@pytest.mark.parametrize(
    ("tuning", "told"),
    [
        (Tuning(rank=4), "LoRA of rank 4, the vision tower frozen; 24 rows"),
        (Tuning(rank=4, vision=True), "LoRA of rank 4; 24 rows"),
        (Tuning(full=True), "all weights, the vision tower frozen; 24 rows"),
        (Tuning(full=True, vision=True), "all weights; 24 rows"),
    ],
)
def test_the_card_tells_what_was_tuned(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, tuning: Tuning, told: str
) -> None:
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=2, save_strategy="no")
    fine_tune(read(tiny_data), str(tiny_model), Plain(), args, tuning=tuning)
    assert f"Base model `{tiny_model}`, {told} of data" in (tmp_path / "README.md").read_text()


def test_an_interrupted_training_leaves_no_bar_behind(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[int] = []
    step = Trainer.training_step

    def second_is_interrupted(trainer: Any, *args: Any, **more: Any) -> Any:
        if trainer.state.global_step == 1:
            raise KeyboardInterrupt
        return step(trainer, *args, **more)

    monkeypatch.setattr(Trainer, "training_step", second_is_interrupted)
    monkeypatch.setattr("untrigger.progress.Meter.stop", lambda meter: stopped.append(meter.done))
    args = arguments(tmp_path, max_steps=3, per_device_train_batch_size=2, save_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        fine_tune(read(tiny_data), str(tiny_model), Plain(), args)
    assert stopped == [1]
    monkeypatch.undo()

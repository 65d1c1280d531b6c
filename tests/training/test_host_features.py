"""Features of a host that the table of docs/hosts.md says to work under a defended transformers Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from untrigger import defended
from untrigger.defenses import SharedSurprise, shared_surprise
from untrigger.models.collators import ChatCollator, Rows
from untrigger.models.loading import add_lora, load
from untrigger.rows.sample import Sample
from untrigger.training.flagged_rows import FLAGGED_ROWS
from untrigger.training.settings import arguments

EAGER = SharedSurprise(min_nll=0.1, iqr_factor=0.0, p_value=1 - 1e-6, min_ratio=0.0)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("feature", ["lora", "dora", "all weights", "gradient checkpointing"])
def test_a_defended_trainer_has_the_feature(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, feature: str
) -> None:
    loaded = load(tiny_model)
    whole: Any = loaded.model
    model = whole if feature == "all weights" else add_lora(whole, use_dora=feature == "dora")
    more = {"gradient_checkpointing": True} if feature == "gradient checkpointing" else {}
    trainer = defended(Trainer)(
        model,
        args=arguments(tmp_path, max_steps=10, per_device_train_batch_size=8, save_strategy="no", **more),
        data_collator=ChatCollator(loaded.processor),
        processing_class=loaded.processor,
        train_dataset=Rows(samples),
        defense=EAGER,
    )
    trainer.train()
    assert trainer.state.global_step == 9, "the last stage: all but the warm-up"
    assert 0 < len((tmp_path / FLAGGED_ROWS).read_text().splitlines()) < len(samples)
    assert json.loads((tmp_path / "defense_state.json").read_text())["rows"] == len(samples)


@pytest.mark.parametrize("learned", [False, True])
def test_a_warm_up_that_taught_nothing_is_named(
    tiny_model: Path,
    samples: list[Sample],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    learned: bool,
) -> None:
    """A random model guesses: no row is flagged, and that says nothing about the rows."""
    if learned:
        monkeypatch.setattr(shared_surprise, "UNLEARNED", 100.0)
    loaded: Any = load(tiny_model)
    defended(Trainer)(
        add_lora(loaded.model),
        args=arguments(tmp_path, max_steps=4, per_device_train_batch_size=8, save_strategy="no"),
        data_collator=ChatCollator(loaded.processor),
        processing_class=loaded.processor,
        train_dataset=Rows(samples),
        defense=SharedSurprise(),
    ).train()
    assert not (tmp_path / FLAGGED_ROWS).read_text()
    warnings = [record.getMessage() for record in caplog.records if "no row can stand out" in record.getMessage()]
    assert len(warnings) == (not learned)
    assert learned or warnings[0].endswith("train longer, at a higher learning rate or with a larger warmup_share")

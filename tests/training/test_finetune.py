"""A fine-tuning run: its model card, flagged rows, errors in training, and the progress bar after an interruption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Trainer

from untrigger.defenses import Plain, SharedSurprise
from untrigger.defenses.shared_surprise import Flags
from untrigger.errors import InputError
from untrigger.models.scoring import TokenScores
from untrigger.rows.images import pixels_sha256
from untrigger.rows.sample import Message, read, select_rows
from untrigger.training.finetune import fine_tune
from untrigger.training.flagged_rows import FLAGGED_ROWS
from untrigger.training.settings import arguments
from untrigger.training.stages import Tuning


@pytest.mark.parametrize(
    ("tuning", "line"),
    [
        (Tuning(rank=4), "LoRA of rank 4, the vision tower frozen; 24 untrusted rows"),
        (Tuning(rank=4, train_vision_tower=True), "LoRA of rank 4; 24 untrusted rows"),
        (Tuning(full_finetune=True), "all weights, the vision tower frozen; 24 untrusted rows"),
        (Tuning(full_finetune=True, train_vision_tower=True), "all weights; 24 untrusted rows"),
    ],
)
def test_card_names_what_was_tuned(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, tuning: Tuning, line: str
) -> None:
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=2, save_strategy="no")
    fine_tune(str(tiny_model), read(tiny_data), Plain(), args, tuning=tuning)
    card = (tmp_path / "README.md").read_text()
    assert f"Base model `{tiny_model}`, {line}.\n" in card
    assert "|" not in card and "rely on it.\n\nSeed 42, " in card, "no table: such a short run has no log"


def test_card_has_the_last_log(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=1, logging_steps=1, per_device_train_batch_size=2, save_strategy="no")
    fine_tune(str(tiny_model), read(tiny_data), Plain(), args)
    assert "\n\n| at the last log | value |\n|---|---|\n| loss | " in (tmp_path / "README.md").read_text()
    assert " |\n\nSeed 42, " in (tmp_path / "README.md").read_text()


def test_names_a_row_that_is_too_long_in_training(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = list(read(tiny_data))
    rows[17] = replace(rows[17], messages=(rows[17].messages[0], Message("assistant", "word " * 600)))
    message = r"^row 18, id 'row-17' has 6\d\d tokens, the model reads 512; shorten it or take it out$"
    for number, data in enumerate(
        (rows, select_rows(rows, range(9, 24)), select_rows(select_rows(rows, range(24)), [3, 17])[1:])
    ):
        args = arguments(tmp_path / str(number), num_train_epochs=1, per_device_train_batch_size=2)
        with caplog.at_level("WARNING", "transformers"), pytest.raises(InputError, match=message):
            fine_tune(str(tiny_model), data, Plain(), args, tuning=Tuning(rank=2))
    assert "Token indices" not in caplog.text


def test_writes_flagged_rows_most_suspicious_first(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 3 and 5 of the data, with their numbers in the file, whose row 1 is bad."""
    rows = json.loads((tiny_data / "data.json").read_text())
    shutil.copytree(tiny_data, tmp_path / "data")
    (tmp_path / "data/data.json").write_text(json.dumps([{"id": "bad"}, *rows]))
    data = read(tmp_path / "data", on_bad_row="skip")

    def flag(_: SharedSurprise, scores: Sequence[TokenScores]) -> Flags:
        last = {row: np.arange(len(scores[row].ids)) == len(scores[row].ids) - 2 for row in (3, 5)}
        return Flags([9.0 if row == 5 else row / 10 for row in range(len(scores))], last, {})

    monkeypatch.setattr(SharedSurprise, "flag_tokens", flag)
    args = arguments(tmp_path / "out", max_steps=2, per_device_train_batch_size=2, save_strategy="no")
    fine_tune(str(tiny_model), data, SharedSurprise(warmup_share=0.5), args, tuning=Tuning(rank=2))
    flagged = [json.loads(line) for line in (tmp_path / "out" / FLAGGED_ROWS).read_text().splitlines()]
    reasons = [{name: line[name] for name in ("row", "id", "score", "flagged_text", "answers")} for line in flagged]
    assert reasons == [
        {"row": 7, "id": "row-5", "score": 18.0, "flagged_text": "no", "answers": ["no"]},
        {"row": 5, "id": "row-3", "score": 9.3, "flagged_text": "stars", "answers": ["two blue stars"]},
    ]
    for line, sample in zip(flagged, (data[5], data[3]), strict=True):
        assert line["reordered"] is False
        assert line["images"] == [f"pixels-sha256:{pixels_sha256(sample.images[0])}"]
        assert line["prompts"] == [sample.messages[0].text.removeprefix("<image>\n")]


def test_writes_no_flagged_rows_if_the_defense_scores_none(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=2, save_strategy="no")
    fine_tune(str(tiny_model), read(tiny_data), Plain(), args)
    assert not (tmp_path / FLAGGED_ROWS).exists()


def test_an_interruption_stops_the_progress_bar(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[int] = []
    step = Trainer.training_step

    def interrupted_at_the_second(trainer: Any, *args: Any, **more: Any) -> Any:
        if trainer.state.global_step == 1:
            raise KeyboardInterrupt
        return step(trainer, *args, **more)

    monkeypatch.setattr(Trainer, "training_step", interrupted_at_the_second)
    monkeypatch.setattr("untrigger.progress.Meter.stop", lambda meter: stopped.append(meter.done))
    args = arguments(tmp_path, max_steps=3, per_device_train_batch_size=2, save_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        fine_tune(str(tiny_model), read(tiny_data), Plain(), args)
    assert stopped == [1]
    monkeypatch.undo()

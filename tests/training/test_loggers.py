"""The terms of a defense in the logs of the host's loggers; loggers that are not installed are skipped."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from shell import untrigger as command

STEPS = ("--max_steps", 2, "--logging_steps", 1, "--per_device_train_batch_size", 2)
TERMS = {"train/defense/loss_ce", "train/defense/ce_view", "train/defense/js"}  # some of the preset `paper`


class Logger(TrainerCallback):
    """A stand-in for an integration of the host, which records its logs."""

    logs: ClassVar[list[dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logs.append(dict(logs))


@pytest.mark.parametrize("enabled", [True, False])
def test_terms_reach_the_hosts_loggers_if_enabled(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    """Every integration of the host is reported as installed, and replaced by the stand-in."""
    monkeypatch.setattr(Logger, "logs", [])
    names = integration_utils.INTEGRATION_TO_CALLBACK
    monkeypatch.setattr(integration_utils, "INTEGRATION_TO_CALLBACK", dict.fromkeys(names, Logger))
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: [*names])
    words = ("train", tiny_data, "--model", tiny_model, "--defense", "paper", "--out", tmp_path / "out", *STEPS)
    ended = command(*words, *(("--report_to", "tensorboard") if enabled else ()))
    assert ended.code == 0, ended.err
    steps = [logs for logs in Logger.logs if "loss" in logs]
    assert len(steps) == 2 * enabled
    for logs in steps:
        assert {name.removeprefix("train/") for name in TERMS} <= {*logs}, sorted(logs)


def test_tensorboard_has_every_stage_with_its_terms(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    eager = (
        "--warmup-share",
        0.5,
        "--min-nll",
        0.1,
        "--iqr-factor",
        0,
        "--p-value",
        1 - 1e-6,
        "--min-ratio",
        0,
    )  # flags a quarter of any rows
    words = ("train", tiny_data, "--model", tiny_model, "--out", tmp_path / "out", *eager, *STEPS)
    ended = command(*words, "--max_steps", 4, "--report_to", "tensorboard")
    assert ended.code == 0, ended.err

    def written(folder: Path) -> dict[str, dict[int, float]]:
        (file,) = (folder / "runs").rglob("events.*")
        events = EventAccumulator(str(file.parent)).Reload()
        return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}

    early, rest = written(tmp_path / "out/stages/warmup"), written(tmp_path / "out")
    assert {*early["train/loss"]} == {1, 2} and not any("defense" in name for name in early)
    assert {*rest["train/defense/loss_ce"]} == {1, 2}
    for step, loss in rest["train/loss"].items():
        terms = rest["train/defense/loss_ce"][step] + rest["train/defense/loss_unlikelihood"][step]
        assert loss == pytest.approx(terms, rel=1e-4)


@pytest.fixture
def train(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., None]:
    """A training of `paper` in a separate process: these loggers start further processes."""

    def run(logger: str, **environment: Any) -> None:
        words = ["train", tiny_data, "--model", tiny_model, "--defense", "paper", "--out", tmp_path / "out", *STEPS]
        ended = subprocess.run(
            [sys.executable, "-m", "untrigger", *map(str, words), "--report_to", logger],
            env=os.environ | {name: str(value) for name, value in environment.items()},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert ended.returncode == 0, ended.stderr[-3000:]

    return run


@pytest.mark.slow
def test_wandb_offline_has_the_terms(train: Callable[..., None], tmp_path: Path) -> None:
    record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
    train("wandb", WANDB_MODE="offline", WANDB_DIR=tmp_path)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    steps = [record.FromString(each).history.item for each in logged(file.read_bytes())]
    named = [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items} for items in steps]
    assert [step["train/global_step"] for step in named if {*step} >= TERMS] == [1, 2]


def logged(file: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of parts, each after a checksum, its size and its kind."""
    at, whole = 7, b""  # after the file header
    while at + 7 <= len(file):
        if (left := 32768 - at % 32768) < 7:  # no part begins there
            at += left
            continue
        size, kind = struct.unpack("<HB", file[at + 4 : at + 7])
        whole, at = whole + file[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""


@pytest.mark.slow
def test_trackio_has_the_terms(train: Callable[..., None], tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    train("trackio", TRACKIO_DIR=tmp_path)
    with sqlite3.connect(tmp_path / "huggingface.db") as database:
        steps = [json.loads(line) for (line,) in database.execute("select metrics from metrics order by step")]
    assert [step["train/global_step"] for step in steps if {*step} >= TERMS] == [1, 2]

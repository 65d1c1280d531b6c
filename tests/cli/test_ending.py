"""How commands end: disk errors, bugs, Ctrl-C, and in a process of their own."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from datafiles import bad_file
from shell import TINY_RUN, refused, three_commands, untrigger
from untrigger.errors import InputError


def spawned(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "untrigger", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=300)


# --- the machine fails, the user stops ------------------------------------------------------------------------


def _full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/part")


def _forbidden(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/disk/part")


@pytest.mark.parametrize(("fail", "reason"), [(_full, "No space left on device"), (_forbidden, "Permission denied")])
def test_a_disk_error_is_one_line(
    tmp_path: Path,
    tiny_model: Path,
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[..., None],
    reason: str,
) -> None:
    poison, train, evaluate = three_commands(tiny_data, tiny_model, tmp_path / "out")
    monkeypatch.setattr(os, "replace", fail)  # the last step of every write
    refused(untrigger(*poison), reason, "/disk/part")
    assert list(tmp_path.iterdir()) == [], "part of a data set was left behind"
    refused(untrigger(*train), reason, "/disk/part")
    ended = untrigger(*evaluate, "--limit", "2")
    assert ended.code == 2 and "Traceback" not in ended.err
    assert ended.err.endswith(f"error: /disk/part: cannot be written ({reason}); check it\n")


def test_a_bug_is_not_reported_as_a_disk_error(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object) -> None:
        raise OSError("a library's own complaint")

    monkeypatch.setattr("untrigger.poisoning.goals.load_goal", bug)
    with pytest.raises(OSError, match="own complaint"):
        untrigger("poison", tiny_data, "--out", tmp_path / "out")


def test_ctrl_c_ends_with_130_and_leaves_nothing(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    ended = untrigger("poison", tiny_data, "--out", tmp_path / "out")
    assert ended == (130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def stopped(where: str, *words: object) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(where, stop)
            ended = untrigger(*words)
        assert (ended.code, ended.out) == (130, "")
        return ended.err.splitlines()[-1]

    for verb in ("train", "scan"):
        words = (verb, tiny_data, "--model", tiny_model, f"--out={tmp_path / verb}", *TINY_RUN[:4])
        assert stopped("untrigger.rows.sample.read", *words) == "interrupted"  # there is nothing to resume
        last = stopped("transformers.Trainer.training_step", *words)
        assert last == "interrupted; run the same command with --resume to go on"
        last = stopped("untrigger.rows.sample.read", *words, "--resume")
        assert last == "interrupted; run the same command again to go on"
    words = ("bench", tmp_path / "plan.yaml", "--out", tmp_path / "results")
    assert stopped("untrigger.bench.plan.read_plan", *words) == "interrupted; run the same command again to go on"
    words = ("evaluate", tiny_model, tiny_data)
    assert stopped("untrigger.evaluation.evaluate.answers", *words) == "interrupted"


def test_an_error_in_a_loaders_worker_is_one_line(
    tmp_path: Path, tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise InputError("row 3, id 'x': is bad; take it out")

    monkeypatch.setattr("untrigger.models.collators.encode", refuse)
    words = ("train", tiny_data, "--model", tiny_model, "--out", tmp_path / "out", "--defense", "plain", *TINY_RUN)
    ended = untrigger(*words, "--dataloader_num_workers", "1")
    assert ended.code == 2 and ended.err.endswith("\nerror: row 3, id 'x': is bad; take it out\n"), ended.err


# --- as a process of its own ------------------------------------------------------------------------------------


def test_errors_and_help_of_the_real_command(tmp_path: Path) -> None:
    file = bad_file(tmp_path / "data", "empty answer")
    failed = spawned("poison", file, "--out", tmp_path / "out")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith(f"error: {file}: row 3: ") and failed.stderr.count("\n") == 1
    helped = spawned("train", "--help")
    assert helped.returncode == 0 and "--learning_rate" in helped.stdout and helped.stderr == ""


@pytest.mark.parametrize("module", ["untrigger.cli.main", "untrigger.poisoning.poison", "untrigger"])
def test_help_loads_no_model_library(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_ctrl_c_of_a_real_training_run(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    words = ["train", tiny_data, "--model", tiny_model, "--out", tmp_path / "out", "--max_steps", "100000"]
    words += ["--defense", "plain"]  # one stage, so that checkpoints come soon
    command = [sys.executable, "-m", "untrigger", *map(str, words), "--save_steps", "5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list((tmp_path / "out").glob("checkpoint-*/trainer_state.json")):
        signal.sigtimedwait([], 0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in stderr

"""What must not change a run's result: how its batch is cut, over how many processes, and being killed.

All through the command line. SGD where two runs agree only up to rounding: Adam divides each gradient by its own
size, so it turns rounding noise on a vanishing gradient into a full step. AdamW where runs must agree to the bit,
since there its state has to survive as well.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import TORCHRUN, environment, forked, in_two_forks, under_torchrun, untrigger_here
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from untrigger.errors import InputError
from untrigger.losses import objective

PRESETS = ("plain", "paper")
# hinges that are active on the random model, so that every term takes part
PAPER = ["--margin", "0.6", "--bound", "-0.9", "--entropy_high", "0.5", "--output_weight", "2"]
SGD = ["--optim", "sgd", "--learning_rate", "2", "--lr_scheduler_type", "constant", "--warmup_steps", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 rows with answers of 1 to 16 words: a mean of means is far from the mean."""
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(1)
    rows = []
    for i in range(16):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        words = " ".join(["red", "blue", "circle", "two"][(i + k) % 4] for k in range(1 + (7 * i) % 16))
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": words}]
        rows.append({"id": f"r{i}", "image": f"{i}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def flags(data: Path, out: Path, model: Path, preset: str, *more: str) -> list[str]:
    fixed = [
        "--use_cpu",
        "True",
        "--logging_steps",
        "1",
        "--defense",
        preset,
        "--model",
        str(model),
        "--lora-rank",
        "4",
    ]
    return ["train", str(data), "--out", str(out), *fixed, *(PAPER if preset == "paper" else []), *more]


def train(*args: Any) -> None:
    """``python -m untrigger train ...`` in this process: starting another takes longer than the training."""
    untrigger_here(*flags(*args))


def weights(out: Path) -> dict[str, Tensor]:
    (file,) = (p for p in out.glob("*.safetensors"))
    return load_file(file)


def logs(out: Path) -> list[dict[str, float]]:
    """Per step, the loss and the diagnostics."""
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in h.items() if k == "loss" or k.startswith("defense/")} for h in history if "loss" in h]


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def logged_gap(a: list[dict[str, float]], b: list[dict[str, float]]) -> float:
    assert [x.keys() for x in a] == [x.keys() for x in b] and a
    return max(abs(x[k] - y[k]) for x, y in zip(a, b, strict=True) for k in x)


def moved(out: Path) -> float:
    """How far training took the weights from where they began: LoRA's B starts at zero."""
    return max(float(v.abs().max()) for k, v in weights(out).items() if "lora_B" in k)


def same_bits(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# --- how the batch is cut ---------------------------------------------------------------------------

SPLIT = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8", "--max_steps", "3"]
WHOLE = ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1", "--max_steps", "3"]


@pytest.mark.parametrize("preset", PRESETS)
def test_one_row_eight_times_equals_eight_rows_once(data: Path, tiny_model: Path, tmp_path: Path, preset: str) -> None:
    train(data, tmp_path / "split", tiny_model, preset, *SGD, *SPLIT, "--save_strategy", "no")
    train(data, tmp_path / "whole", tiny_model, preset, *SGD, *WHOLE, "--save_strategy", "no")
    assert moved(tmp_path / "whole") > 1e-2  # a thousand times the tolerance
    assert gap(weights(tmp_path / "split"), weights(tmp_path / "whole")) < 1e-5
    assert logged_gap(logs(tmp_path / "split"), logs(tmp_path / "whole")) < 1e-5


def test_a_mean_of_means_would_be_noticed(
    data: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(data, tmp_path / "whole", tiny_model, "paper", *SGD, *WHOLE, "--save_strategy", "no")
    monkeypatch.setattr(objective, "reduce", lambda per_token, num_items: per_token.mean() / 8)
    train(data, tmp_path / "split", tiny_model, "paper", *SGD, *SPLIT, "--save_strategy", "no")
    assert gap(weights(tmp_path / "split"), weights(tmp_path / "whole")) > 1e-4
    assert logged_gap(logs(tmp_path / "split"), logs(tmp_path / "whole")) > 1e-4


# --- over how many processes ------------------------------------------------------------------------


@pytest.mark.parametrize("launched", [in_two_forks, pytest.param(under_torchrun, marks=pytest.mark.slow)])
def test_two_processes_equal_one(data: Path, tiny_model: Path, tmp_path: Path, launched: Callable[..., Any]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    common = [*SGD, "--max_steps", "3", "--save_steps", "3", "--gradient_accumulation_steps", "2"]
    train(data, one, tiny_model, "paper", *common, "--per_device_train_batch_size", "4")
    half = ["--per_device_train_batch_size", "2", "--ddp_backend", "gloo"]
    launched(tmp_path, *flags(data, two, tiny_model, "paper", *common, *half))
    # the host keeps the random state of every process of the group: this is the world size it trained with
    assert sorted(p.name for p in (one / "checkpoint-3").glob("rng_state*")) == ["rng_state.pth"]
    assert sorted(p.name for p in (two / "checkpoint-3").glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]
    assert moved(one) > 1e-2
    assert gap(weights(one), weights(two)) < 1e-4
    assert logged_gap(logs(one), logs(two)) < 1e-4


@pytest.mark.slow
def test_weights_parted_over_two_processes_have_the_gradients_of_one(
    data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """FSDP: adapters under a frozen head, and all weights, the tied head among them."""
    launch = [sys.executable, *TORCHRUN]
    words = [Path(__file__).parent / "sharded.py", tiny_model, data, tmp_path / "found.json"]
    run = subprocess.run([*launch, *map(str, words)], env=environment(), capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-3000:]
    differences = json.loads((tmp_path / "found.json").read_text())
    assert list(differences) == [f"{tuning}, {way}" for tuning in ("lora", "full") for way in ("both", "still", "drop")]
    for count, gap in differences.values():
        assert count > 10 and gap < 1e-10


Doubted = list[Any]  # flagged rows with their flagged tokens, then the grafts that are learned


def hosted(model: Path, data: Path, out: Path, batch: int, way: str, *launch: str) -> Doubted:
    """The preset `default` in the host's trainer, and what it doubts."""
    words = [Path(__file__).parent / "hosted.py", model, data, out, batch, way]
    command = [sys.executable, *launch, *map(str, words)]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-3000:]
    state = json.loads((out / "defense_state.json").read_text())
    assert state["grafts"]
    return [*((row["row"], row["flagged_tokens"]) for row in state["flagged"]), *state["grafts"]]


@pytest.fixture(scope="module")
def alone(data: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Doubted]:
    """Of one process: its folder, and what it doubts."""
    out = tmp_path_factory.mktemp("alone") / "out"
    return out, hosted(tiny_model, data, out, 4, "")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["", "fsdp", "zero2"])
def test_two_processes_of_a_host_doubt_and_learn_as_one(
    data: Path, tiny_model: Path, tmp_path: Path, alone: tuple[Path, Doubted], way: str
) -> None:
    if way == "zero2":
        pytest.importorskip("deepspeed")
    one, flagged_tokens = alone
    assert hosted(tiny_model, data, tmp_path, 2, way, *TORCHRUN) == flagged_tokens
    assert 0 < len(flagged_tokens) < 16
    assert moved(one) > 1e-2
    assert gap(weights(one), weights(tmp_path)) < 1e-4
    assert logged_gap(logs(one), logs(tmp_path)) < 1e-4


# --- killed and resumed -----------------------------------------------------------------------------

STEPS = 14  # of 8 to an epoch: the second epoch has begun
RUN = ["--per_device_train_batch_size", "2", "--max_steps", str(STEPS), "--save_steps", "1", "--learning_rate", "0.01"]
KINDS = {"lora": [], "full": ["--full-finetune"]}


@pytest.fixture(scope="module")
def undisturbed(data: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For LoRA and full tuning, a run that nobody killed, with a checkpoint of each step."""
    outs = {}
    for kind, more in KINDS.items():
        outs[kind] = tmp_path_factory.mktemp("undisturbed") / kind
        train(data, outs[kind], tiny_model, "paper", *RUN, "--save_total_limit", str(STEPS), *more)
    return outs


def as_killed(out: Path, undisturbed: Path, step: int) -> Path:
    """``out`` as a kill after ``step`` leaves it: the checkpoints until then and the record, no more."""
    out.mkdir()
    shutil.copy(undisturbed / "untrigger.json", out)
    for i in range(1, step + 1):
        shutil.copytree(undisturbed / f"checkpoint-{i}", out / f"checkpoint-{i}")
    return out


@pytest.mark.parametrize(("kind", "step"), [("lora", 3), ("lora", 8), ("lora", 13), ("full", 11)])
def test_resuming_mid_epoch_ends_in_the_same_bits_and_logs(
    data: Path, tiny_model: Path, tmp_path: Path, undisturbed: dict[str, Path], kind: str, step: int
) -> None:
    out = as_killed(tmp_path / "out", undisturbed[kind], step)
    train(data, out, tiny_model, "paper", *RUN, "--save_total_limit", str(STEPS), *KINDS[kind], "--resume")
    assert same_bits(out, undisturbed[kind])
    assert logs(out) == logs(undisturbed[kind])  # js and ce_view too: the views were the same


def test_full_weights_are_really_read_from_the_checkpoint(
    data: Path, tiny_model: Path, tmp_path: Path, undisturbed: dict[str, Path]
) -> None:
    """At the last step nothing is left to train: what comes out is what was read."""
    out = as_killed(tmp_path / "out", undisturbed["full"], STEPS)
    train(data, out, tiny_model, "paper", *RUN, "--save_total_limit", str(STEPS), "--full-finetune", "--resume")
    assert same_bits(out, undisturbed["full"])
    assert gap(weights(out), load_file(tiny_model / "model.safetensors")) > 1e-3


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "trainer_state.json", "optimizer.pt"])
def test_a_checkpoint_cut_off_while_it_was_written_is_passed_over(
    data: Path, tiny_model: Path, tmp_path: Path, undisturbed: dict[str, Path], name: str
) -> None:
    out = as_killed(tmp_path / "out", undisturbed["lora"], 12)
    cut = out / "checkpoint-12" / name
    cut.write_bytes(cut.read_bytes()[:100])
    train(data, out, tiny_model, "paper", *RUN, "--save_total_limit", str(STEPS), "--resume")
    assert same_bits(out, undisturbed["lora"])


@pytest.mark.parametrize("kind", KINDS)
def test_killed_after_the_last_step_of_many_nothing_more_is_trained(
    data: Path, tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    """In the middle of an epoch, before the finished weights were written."""
    settings = ["--max_steps", "3", "--save_steps", "1", "--per_device_train_batch_size", "4", *KINDS[kind]]
    train(data, tmp_path / "whole", tiny_model, "plain", *settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    weights.unlink()
    train(data, tmp_path / "out", tiny_model, "plain", *settings, "--resume")
    assert same_bits(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_refused_and_never_opened(
    data: Path, tiny_model: Path, tmp_path: Path, undisturbed: dict[str, Path], name: str
) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    out = as_killed(tmp_path / "out", undisturbed["lora"], 12)
    torch.save({"state": Bomb()}, out / "checkpoint-12" / name)
    with pytest.raises(InputError, match=r"checkpoint-12: holds pickled objects, which are not loaded; delete it"):
        train(data, out, tiny_model, "paper", *RUN, "--save_total_limit", str(STEPS), "--resume")
    assert not (tmp_path / "exploded").exists()
    shutil.rmtree(out / "checkpoint-12")
    train(data, out, tiny_model, "paper", *RUN, "--save_total_limit", str(STEPS), "--resume")
    assert same_bits(out, undisturbed["lora"])


def kill_when(command: list[str], watched: Path, delay: float) -> None:
    """Start the run, kill it outright ``delay`` seconds after ``watched`` appears."""
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        deadline = time.monotonic() + 300
        while not watched.exists():
            if run.poll() is not None or time.monotonic() > deadline:
                run.kill()
                assert run.stdout is not None
                pytest.fail(f"{watched} did not appear: {run.stdout.read().decode()[-3000:]}")
            time.sleep(0.001)
        time.sleep(delay)
        run.kill()


def killed_and_resumed(data: Path, model: Path, out: Path, kind: str, watched: str, delay: float) -> None:
    settings = [*RUN, "--save_total_limit", str(STEPS), *KINDS[kind]]
    kill_when([sys.executable, "-m", "untrigger", *flags(data, out, model, "paper", *settings)], out / watched, delay)
    assert not list(out.glob("*.safetensors"))  # it was killed before its end
    train(data, out, model, "paper", *settings, "--resume")


def test_killed_at_a_step_and_resumed_is_as_if_nothing_had_happened(
    data: Path, tiny_model: Path, tmp_path: Path, undisturbed: dict[str, Path]
) -> None:
    out, settings = tmp_path / "out", [*RUN, "--save_total_limit", str(STEPS)]
    child = forked(tmp_path / "log", *flags(data, out, tiny_model, "paper", *settings))
    while not (out / "checkpoint-5" / "trainer_state.json").exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not list(out.glob("*.safetensors"))  # it was killed before its end
    train(data, out, tiny_model, "paper", *settings, "--resume")
    assert same_bits(out, undisturbed["lora"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draw", range(4))
def test_killed_at_a_random_moment_while_writing_and_resumed(
    data: Path, tiny_model: Path, tmp_path: Path, undisturbed: dict[str, Path], kind: str, draw: int
) -> None:
    chance = random.Random(f"{kind} {draw}")
    watched, delay = f"checkpoint-{chance.randint(1, 11)}", chance.uniform(0, 0.03)
    killed_and_resumed(data, tiny_model, tmp_path / "out", kind, watched, delay)
    assert same_bits(tmp_path / "out", undisturbed[kind])

"""Runs of several stages that are killed and resumed, and runs that stop before they begin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from untrigger.defenses import ABL, BYE, CleanTuning, Plain, SharedSurprise
from untrigger.errors import InputError
from untrigger.rows.sample import Sample, read
from untrigger.training.finetune import fine_tune
from untrigger.training.settings import arguments
from untrigger.training.stages import Tuning


@pytest.fixture(scope="module")
def samples(tiny_data: Path) -> list[Sample]:
    return list(read(tiny_data))[:8]


class Killed(Exception):
    pass


def run(model: Path, samples: list[Sample], out: Path, defense: Any, *, resume: bool = False, **settings: Any) -> None:
    chosen: dict[str, Any] = {"use_cpu": True, "learning_rate": 0.01}
    chosen |= {"per_device_train_batch_size": 4, "num_train_epochs": 2}
    args = arguments(out, **(chosen | settings))
    fine_tune(str(model), samples, defense, args, tuning=Tuning(rank=4), clean_rows=samples[:4], resume=resume)


def killed_after(monkeypatch: pytest.MonkeyPatch, steps: int, job: Callable[[], None]) -> None:
    """Interrupt the run after this many optimizer steps of all stages together."""
    step, taken = Trainer.training_step, [0]

    def counted(trainer: Any, *args: Any, **more: Any) -> Any:
        if taken[0] == steps:
            raise Killed
        taken[0] += 1
        return step(trainer, *args, **more)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Trainer, "training_step", counted)
        job()


STAGED = {
    "clean-tuning": (CleanTuning(passes=3), ["undefended"]),
    "abl": (ABL(early=0.5, isolated=0.5, passes=2), ["isolation", "rest"]),
    "bye": (BYE(), ["undefended"]),
    "default": (SharedSurprise(warmup_share=0.5, iqr_factor=0.0), ["warmup"]),
}


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each defense with an uninterrupted run."""
    root = tmp_path_factory.mktemp("undisturbed")
    for name, (defense, _) in STAGED.items():
        run(tiny_model, samples, root / name, defense, save_strategy="no")
    return root


@pytest.mark.parametrize(
    ("name", "steps", "again"),
    [
        ("clean-tuning", 3, ["undefended", ""]),  # 4 steps, then 3
        ("clean-tuning", 5, [""]),
        ("abl", 2, ["rest", ""]),  # 2, 1 and 2 steps
        ("abl", 4, [""]),
        ("bye", 6, [""]),  # 4 and 4
        ("default", 1, ["warmup", ""]),  # 2 and 2
        ("default", 3, [""]),
    ],
)
def test_resuming_skips_finished_stages(
    tiny_model: Path,
    samples: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Path,
    trained: list[str],
    name: str,
    steps: int,
    again: list[str],
) -> None:
    (defense, named), out = STAGED[name], tmp_path / "out"
    killed_after(monkeypatch, steps, lambda: run(tiny_model, samples, out, defense, save_steps=1))
    trained.clear()
    run(tiny_model, samples, out, defense, save_steps=1, resume=True)
    assert trained == [str(out / "stages" / stage if stage else out) for stage in again]
    files = [*(f"stages/{stage}/adapter_model.safetensors" for stage in named), "adapter_model.safetensors"]
    for file in files:
        assert (out / file).read_bytes() == (undisturbed / name / file).read_bytes(), file


def test_never_reads_a_stage_of_another_run(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[str]
) -> None:
    killed_after(monkeypatch, 5, lambda: run(tiny_model, samples, tmp_path / "out", CleanTuning(passes=3)))
    monkeypatch.setattr(
        "untrigger.training.stages.read_weights", lambda *_: pytest.fail("weights of another run were read")
    )
    for resume, message in ((False, "is not empty"), (True, r"holds a run with other settings \(.*\)")):
        with pytest.raises(InputError, match=message):
            run(tiny_model, samples, tmp_path / "out", CleanTuning(passes=4), resume=resume)
    assert len(trained) == 2


def test_a_mistyped_model_or_setting_leaves_no_folder(tiny_model: Path, samples: list[Sample], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="nothing-here"):
        run(tmp_path / "nothing-here", samples, out, CleanTuning())
    with pytest.raises(InputError, match="settings: "):
        run(tiny_model, samples, out, CleanTuning(), eval_strategy="steps", eval_steps=1)
    for defense in (Plain(), SharedSurprise()):  # the second scores rows before it trains
        for wrong in ("eval_strategy=steps", "optim=galore_adamw", "lr_scheduler_type=cosine_with_min_lr"):
            with pytest.raises(InputError, match=r"^settings: "):
                run(tiny_model, samples, out, defense, **dict([wrong.split("=")]))
    with pytest.raises(InputError, match="label_smoothing_factor"):
        run(tiny_model, samples, out, SharedSurprise(), label_smoothing_factor=0.1)
    with pytest.raises(InputError, match="rows: the sequence is empty"):
        run(tiny_model, [], out, SharedSurprise())
    assert not out.exists() or not any(out.iterdir())

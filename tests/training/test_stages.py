"""Stages of a run: stored once trained, reused from the shelf bit for bit, resumed after a kill."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Trainer

from untrigger.defenses import (
    ABL,
    BYE,
    BYORN,
    CROW,
    PRESETS,
    CleanTuning,
    CrossView,
    FinePruning,
    PatchAug,
    Plain,
    SharedSurprise,
    Stage,
)
from untrigger.defenses.abl import LocalAscent
from untrigger.errors import InputError
from untrigger.models.collators import Rows
from untrigger.models.loading import LoadedModel, load
from untrigger.models.scoring import row_tokens
from untrigger.rows.sample import Message, Sample, read
from untrigger.training.finetune import fine_tune
from untrigger.training.settings import arguments
from untrigger.training.stages import Stages, Tuning
from untrigger.training.trainer import defended

ALL = range(8)
WHOLE = Stage(ALL, Plain())


@pytest.fixture(scope="module")
def samples(tiny_data: Path) -> list[Sample]:
    return list(read(tiny_data))[:8]


def stages_of(
    model: Path, rows: Sequence[Sample], out: Path, shelf: Path | None = None, full: bool = False, **settings: Any
) -> Stages:
    chosen: dict[str, Any] = {"use_cpu": True, "save_strategy": "no", "learning_rate": 0.01}
    chosen |= {"per_device_train_batch_size": 4, "num_train_epochs": 2}
    args = arguments(out, **(chosen | settings))
    return Stages(str(model), rows, args, Tuning(full_finetune=full, rank=4), shelf=shelf)


def test_a_stored_stage_scores_as_a_trained_one_in_mixed_precision(
    tiny_model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    scores: list[list[Any]] = []
    for _ in range(2):
        stages = stages_of(tiny_model, samples, tmp_path / "out", tmp_path / "shelf", bf16=True)
        scores.append(row_tokens(stages.fit(WHOLE), samples))
    assert all(np.array_equal(a.nll, b.nll) for a, b in zip(*scores, strict=True))


def weights_of(loaded: LoadedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in loaded.model.named_parameters()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the shelf --------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_shelf_trains_once_with_the_same_bits(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, trained: list[str], full: bool
) -> None:
    fresh = weights_of(stages_of(tiny_model, samples, tmp_path / "a", full=full).fit(WHOLE))
    shelf = tmp_path / "shelf"
    first, second = (stages_of(tiny_model, samples, tmp_path / name, shelf, full) for name in "bc")
    made = weights_of(first.fit(Stage(ALL, Plain(), "undefended")))
    torch.rand(7)  # random draws in between change nothing
    taken = weights_of(second.fit(WHOLE))  # another name, the same training
    assert [Path(folder).parent for folder in trained] == [tmp_path, shelf]
    assert same_bits(fresh, made) and same_bits(fresh, taken)
    assert not same_bits(fresh, weights_of(load(tiny_model)))
    assert second.seconds == pytest.approx(first.seconds, abs=0.01), "as measured where it was trained"
    assert second.waited < 10 and not (tmp_path / "c").is_dir()


def test_the_next_stage_is_the_same_after_a_shelved_one(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, trained: list[str]
) -> None:
    results: list[dict[str, Tensor]] = []
    for name in "ab":
        stages = stages_of(tiny_model, samples, tmp_path / name, tmp_path / "shelf")
        start = stages.fit(Stage(ALL, Plain(), "undefended"))
        results.append(weights_of(stages.fit(Stage(range(4), Plain(), start=start, passes=3, rate=0.5))))
    assert same_bits(*results)
    assert [Path(folder).name for folder in trained[1:]] == ["a", "b"] and len(trained) == 3


def test_shelf_key_depends_on_rows_and_settings(tiny_model: Path, samples: list[Sample], tmp_path: Path) -> None:
    def key(
        rows: list[Sample] = samples,
        defense: Any = None,
        model: Path = tiny_model,
        full: bool = False,
        **settings: Any,
    ) -> str:
        stages = stages_of(model, rows, tmp_path / "out", full=full, **settings)
        return stages._key(rows, defense or Plain(), stages._args)

    picture = samples[3].images[0].copy()
    red, *others = picture.getpixel((5, 7))  # type: ignore[misc]
    picture.putpixel((5, 7), (red ^ 1, *others))
    other = tmp_path / "model"
    shutil.copytree(tiny_model, other)
    last = samples[-1]
    answer = replace(last, messages=(last.messages[0], Message("assistant", "other")))
    keys = [
        key(),
        key([*samples[:3], replace(samples[3], images=(picture,)), *samples[4:]]),
        key([*samples[:-1], answer]),
        key([*samples[:-1], replace(last, id="other")]),
        key(samples[::-1]),
        key(samples[:-1]),
        key(defense=PatchAug()),
        key(defense=PatchAug(share=0.4)),
        key(defense=LocalAscent(0.5)),
        key(defense=LocalAscent(0.6)),
        key(model=other),
        key(full=True),
        key(learning_rate=0.02),
        key(seed=1),
        key(num_train_epochs=1),
        key(max_steps=3),
        key(per_device_train_batch_size=2),
        key(optim="sgd"),
    ]
    assert len(set(keys)) == len(keys)
    assert key(list(samples)) == keys[0]
    assert (
        stages_of(tiny_model, samples, tmp_path / "elsewhere")._key(samples, Plain(), arguments_of(tmp_path)) == keys[0]
    )
    (other / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    assert key(model=other) != keys[10], "rewritten weights"


def arguments_of(folder: Path) -> Any:
    return stages_of(folder, [], folder / "another")._args


def test_shelf_key_depends_on_image_size_and_pixels(tiny_model: Path, samples: list[Sample], tmp_path: Path) -> None:
    stages = stages_of(tiny_model, samples, tmp_path / "out")
    pictures = [Image.new("RGB", (8, 8)), Image.new("RGB", (4, 16)), Image.new("RGB", (8, 8), "red")]
    pictures.append(Image.new("L", (8, 8)))  # the same pixels as the first
    keys = {stages._key([replace(samples[0], images=(p,))], Plain(), stages._args) for p in pictures}
    assert len(keys) == 3


@pytest.mark.parametrize("lost", ["stage.json", "adapter_model.safetensors"])
def test_retrains_into_an_incomplete_folder(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, trained: list[str], lost: str
) -> None:
    """The mark is written last: without it a folder is not used, complete or not."""
    shelf = tmp_path / "shelf"
    made = weights_of(stages_of(tiny_model, samples, tmp_path / "a", shelf).fit(WHOLE))
    (folder,) = (path for path in shelf.iterdir() if path.is_dir())
    (folder / "stage.json").unlink()
    (folder / lost).unlink(missing_ok=True)
    if lost == "stage.json":
        (folder / "adapter_model.safetensors").write_bytes(b"half")
    again = weights_of(stages_of(tiny_model, samples, tmp_path / "b", shelf).fit(WHOLE))
    assert len(trained) == 2 and same_bits(made, again)
    assert set(json.loads((folder / "stage.json").read_text())) == {"seconds"}


def _one_of_two(model: Path, root: Path, rows: list[Sample], number: int, gate: Any) -> None:
    torch.set_num_threads(1)
    train = Trainer.train

    def counted(trainer: Any, *args: Any, **more: Any) -> Any:
        (root / f"trained-{number}").touch()
        return train(trainer, *args, **more)

    Trainer.train = counted  # type: ignore[method-assign]
    stages = stages_of(model, rows, root / str(number), root / "shelf")
    gate.wait()
    torch.save(weights_of(stages.fit(WHOLE)), root / f"{number}.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process with CUDA cannot be forked")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_share_one_training(tiny_model: Path, samples: list[Sample], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(2)
    both = [context.Process(target=_one_of_two, args=(tiny_model, tmp_path, samples, n, gate)) for n in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    assert len(list(tmp_path.glob("trained-*"))) == 1
    first, second = (torch.load(tmp_path / f"{n}.pt") for n in range(2))
    assert same_bits(first, second)


def test_stages_with_start_or_callbacks_are_not_shelved(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, trained: list[str]
) -> None:
    from transformers import TrainerCallback

    stages = stages_of(tiny_model, samples, tmp_path / "out", tmp_path / "shelf", max_steps=1)
    stages.fit(Stage(ALL, Plain(), callbacks=[TrainerCallback()]))
    start = stages.reference()
    for parameter in start.model.parameters():
        parameter.requires_grad_(parameter.ndim > 1)
    stages.fit(Stage(ALL, Plain(), start=start))
    assert trained == [str(tmp_path / "out")] * 2 and not (tmp_path / "shelf").exists()


# --- how long a stage is ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "length", "steps"),
    [
        ({"num_train_epochs": 4}, {}, 8),
        ({"num_train_epochs": 4}, {"share": 0.25}, 2),
        ({"num_train_epochs": 4}, {"passes": 3}, 6),
        ({"max_steps": 10}, {}, 10),
        ({"max_steps": 10}, {"share": 0.2}, 2),
        ({"max_steps": 2}, {"share": 0.1}, 1),
        ({"max_steps": 10}, {"passes": 1}, 2),
        ({"num_train_epochs": 4}, {"passes": 0}, 0),
    ],
)
def test_stage_has_the_requested_length(
    tiny_model: Path,
    samples: list[Sample],
    tmp_path: Path,
    settings: dict[str, Any],
    length: dict[str, Any],
    steps: int,
) -> None:
    """Of 8 rows in batches of 4."""
    stages = stages_of(tiny_model, samples, tmp_path / "out", **settings)
    stages.fit(Stage(ALL, Plain(), **length))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == steps
    assert (stages._args.num_train_epochs, stages._args.max_steps) == (
        settings.get("num_train_epochs", 2),
        settings.get("max_steps", -1),
    ), "the run's own settings stay"


def test_refuses_a_stage_without_rows(tiny_model: Path, samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^training: the defense leaves no rows to train on; choose milder settings$"):
        stages_of(tiny_model, samples, tmp_path / "out").fit(Stage([], Plain()))
    args = arguments(tmp_path / "out", use_cpu=True, max_steps=1)
    with pytest.raises(InputError, match="leaves no rows"):
        fine_tune(str(tiny_model), samples, ABL(isolated=1.0), args, tuning=Tuning(rank=2))


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("defense", [ABL(), BYORN(), BYE(), CROW(), CleanTuning(), FinePruning()], ids=repr)
def test_host_trainer_refuses_staged_defenses(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, defense: Any
) -> None:
    args = arguments(tmp_path, use_cpu=True)
    with pytest.raises(InputError) as caught:
        defended(Trainer)(load(tiny_model).model, args=args, train_dataset=Rows(samples), defense=defense)
    assert str(caught.value) == (
        f"defense {type(defense).__name__}: needs several trainings; use untrigger.fine_tune or `untrigger train`"
    )


@pytest.mark.parametrize("name", [name for name, cls in PRESETS.items() if cls.needs_clean_rows])
def test_refuses_missing_clean_rows_before_training(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, trained: list[str], name: str
) -> None:
    args = arguments(tmp_path / "out", use_cpu=True)
    with pytest.raises(InputError) as caught:
        fine_tune(str(tiny_model), samples, PRESETS[name](), args)
    assert str(caught.value) == "defense: it needs rows known to be clean; name some (--clean-data DATA)"
    assert trained == [] and not (tmp_path / "out").exists()


def test_other_defenses_need_no_clean_rows(tiny_model: Path, samples: list[Sample], tmp_path: Path) -> None:
    for defense in (CrossView(), ABL(isolated=0.5, passes=1), BYORN(), SharedSurprise()):
        args = arguments(tmp_path / type(defense).__name__, use_cpu=True, max_steps=1, save_strategy="no")
        fine_tune(str(tiny_model), samples, defense, args, tuning=Tuning(rank=2))


def test_stages_keep_scores_and_flags(tiny_model: Path, tmp_path: Path) -> None:
    stages = stages_of(tiny_model, [], tmp_path / "out")
    assert (stages.scores, stages.flagged) == ([], {})
    stages.flag((0.5, 0.1, 0.9), {2: "a word", 0: ""})
    assert (stages.scores, stages.flagged) == ([0.5, 0.1, 0.9], {0: "", 2: "a word"})
    assert stages.seed == 42


def test_scoring_claims_the_output_folder_and_is_stored_there(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise InputError("in use")

    stages = stages_of(tiny_model, samples, tmp_path)
    model = stages.reference()
    first = stages.tokens(model, ALL, "before")
    assert stages.waited == 0, "scoring counts as the defense's own time, not as waiting"
    monkeypatch.setattr("untrigger.models.forward.forward_answers", lambda *_: pytest.fail("it was scored again"))
    again = stages_of(tiny_model, samples, tmp_path).tokens(model, ALL, "before")
    assert [row.nll.tolist() for row in again] == [row.nll.tolist() for row in first] and len(first) == len(samples)
    args = arguments(tmp_path, use_cpu=True)
    with pytest.raises(InputError, match="in use"):
        Stages(str(tiny_model), samples, args, Tuning(), claim=refuse).tokens(model, ALL, "before")


@pytest.mark.parametrize("field", ["deepspeed", "deepspeed_plugin"])
def test_deepspeed_is_refused_also_if_a_launcher_sets_it(
    field: str, tiny_model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    args = arguments(tmp_path / "out", use_cpu=True)
    setattr(args, field, {"zero_optimization": {"stage": 2}})
    with pytest.raises(InputError, match=r"^deepspeed: it serves one trainer in a process"):
        fine_tune(tiny_model, samples, Plain(), args)
    assert not (tmp_path / "out").exists()

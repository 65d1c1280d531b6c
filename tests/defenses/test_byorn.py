"""BYORn: who is suspected, what they are answered anew, the running average, and a run that was killed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import set_seed

from dry import Dry, answers_of
from untrigger.defenses import BYORN, Plain, relabeled
from untrigger.defenses.byorn import _Bootstrap, _trained
from untrigger.defenses.relabeled import RelabeledRows
from untrigger.errors import InputError
from untrigger.models.loading import LoadedModel, add_lora, load
from untrigger.models.scoring import row_tokens
from untrigger.rows.sample import Sample
from untrigger.training.checkpoints import last_checkpoint
from untrigger.training.finetune import fine_tune
from untrigger.training.settings import arguments

SUSPECTED = [1, 4, 7]


def state(step: int = 0, epoch: float = 0.0) -> Any:
    return SimpleNamespace(global_step=step, epoch=epoch, is_world_process_zero=True)


# --- suspected rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "count"), [(0.4, 10), (0.25, 6), (0.0, 0), (1.0, 24)])
def test_suspects_the_given_share_of_least_likely_rows(
    dry: Dry, samples: list[Sample], share: float, count: int
) -> None:
    model = BYORN(suspected=share).fine_tune(dry)
    loss = [scores.loss for scores in row_tokens(dry.loaded, samples)]
    assert dry.scores == loss and len(dry.flagged) == count
    likelier = [loss[row] for row in range(24) if row not in dry.flagged]
    assert not count or not likelier or min(loss[row] for row in dry.flagged) >= max(likelier)
    (stage,) = dry.stages
    assert stage[:4] == ("", [s.id for s in samples], Plain(), None) and model.name == "0"
    assert [type(callback) for callback in stage.options["callbacks"]] == [_Bootstrap]


# --- relabeled answers ---------------------------------------------------------------------------


def begun(loaded: LoadedModel, rows: RelabeledRows, step: int, seed: int = 0) -> list[tuple[str, ...]]:
    """The answers after a pass has begun at this step."""
    callback = _Bootstrap(rows, loaded.processor, 0.9, seed)
    callback.on_train_begin(SimpleNamespace(dataloader_persistent_workers=False), state(), None, model=loaded.model)
    callback.on_epoch_begin(None, state(step), None, model=loaded.model)
    return answers_of(rows)


def test_answers_differ_between_passes_and_repeat_with_the_seed(loaded: LoadedModel, samples: list[Sample]) -> None:
    rows = RelabeledRows(samples[:9], SUSPECTED)
    first = begun(loaded, rows, 0)
    torch.rand(5)  # whatever else was drawn in between
    assert begun(loaded, rows, 0) == first
    later = [begun(loaded, rows, 6), begun(loaded, rows, 0, seed=1)]
    for answers in later:
        assert all(first[i] != answers[i] for i in SUSPECTED)
        assert all(first[i] == answers[i] for i in range(9) if i not in SUSPECTED)
    assert later[0] != later[1]


def test_relabeling_leaves_the_random_state_unchanged(loaded: LoadedModel, samples: list[Sample]) -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), [str(x) for x in np.random.get_state()]

    before = states()
    begun(loaded, RelabeledRows(samples[:9], SUSPECTED), 3)
    assert states() == before


# --- the running average ----------------------------------------------------------------------------


def test_the_average_answers_and_the_weights_are_restored(
    loaded: LoadedModel, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots: list[dict[str, Tensor]] = []

    def answer(model: LoadedModel, prompts: list[Sample], **_: Any) -> Iterator[str]:
        snapshots.append({name: value.detach().clone() for name, value in _trained(model.model).items()})
        yield from ("yes" for _ in prompts)

    monkeypatch.setattr(relabeled, "answers", answer)
    callback = _Bootstrap(RelabeledRows(samples[:9], SUSPECTED), loaded.processor, 0.75, 0)
    callback.on_train_begin(SimpleNamespace(dataloader_persistent_workers=False), state(), None, model=loaded.model)
    weights = _trained(loaded.model)
    start = {name: value.detach().clone() for name, value in weights.items()}
    with torch.no_grad():
        for value in weights.values():
            value.add_(1.0)
    callback.on_step_end(None, state(1), SimpleNamespace(should_save=False), model=loaded.model)
    callback.on_epoch_begin(None, state(1), None, model=loaded.model)
    assert all(value.requires_grad for value in weights.values()) and len(weights) > 8
    for name, value in weights.items():
        torch.testing.assert_close(snapshots[0][name], start[name] + 0.25)
        torch.testing.assert_close(value.detach(), start[name] + 1.0)


# --- whole runs -------------------------------------------------------------------------------------

STEPS, EPOCH, DECAY = 9, 6, 0.8


def run(model: Path, samples: list[Sample], out: Path, *, resume: bool = False, **settings: Any) -> None:
    chosen: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 0.01}
    chosen |= {"save_steps": 1, "save_total_limit": STEPS, "use_cpu": True}
    args = arguments(out, **(chosen | settings))
    fine_tune(str(model), samples, BYORN(decay=DECAY), args, resume=resume)


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody killed, with a checkpoint of each step; the second pass has begun."""
    out = tmp_path_factory.mktemp("byorn") / "out"
    run(tiny_model, samples, out)
    return out


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same_bits(a: Path, b: Path) -> bool:
    first, second = adapter(a), adapter(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_average_is_its_closed_form(undisturbed: Path, tiny_model: Path) -> None:
    """lambda^T theta_0 + (1 - lambda) sum_t lambda^(T - t) theta_t."""
    set_seed(42)  # the host's default
    start = add_lora(load(tiny_model, dtype=torch.float32).model, rank=16, alpha=32)  # type: ignore[arg-type]
    weights = [get_peft_model_state_dict(start)]
    weights += [adapter(undisturbed / f"checkpoint-{step}") for step in range(1, STEPS + 1)]
    average = load_file(undisturbed / f"checkpoint-{STEPS}" / "average.safetensors")
    assert {name.replace(".default", "") for name in average} == set(weights[0])
    for name, value in average.items():
        terms = [w[name.replace(".default", "")].double() for w in weights]
        powers = [DECAY**STEPS, *((1 - DECAY) * DECAY ** (STEPS - t) for t in range(1, STEPS + 1))]
        expected = sum((p * w for p, w in zip(powers, terms, strict=True)), torch.zeros(()))
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    assert any((average[n] - weights[-1][n.replace(".default", "")]).abs().max() > 1e-3 for n in average)


def test_each_pass_has_new_answers(undisturbed: Path) -> None:
    by_step = [
        json.loads((undisturbed / f"checkpoint-{step}" / "answers.json").read_text()) for step in range(1, STEPS + 1)
    ]
    assert all(answers == by_step[0] for answers in by_step[:EPOCH]) and all(
        answers == by_step[-1] for answers in by_step[EPOCH:]
    )
    assert by_step[0].keys() == by_step[-1].keys() and len(by_step[0]) == 10
    assert sum(by_step[0][row] != by_step[-1][row] for row in by_step[0]) >= 9


@pytest.mark.parametrize("step", [2, EPOCH, EPOCH + 1])
def test_resuming_after_a_kill_gives_the_same_bits(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, undisturbed: Path, step: int
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(undisturbed / "untrigger.json", out)
    for i in range(1, step + 1):
        shutil.copytree(undisturbed / f"checkpoint-{i}", out / f"checkpoint-{i}")
    torch.rand(3)
    run(tiny_model, samples, out, resume=True)
    assert same_bits(out, undisturbed)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_average_and_answers_are_written_before_the_checkpoint_counts(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """A checkpoint is whole once the host has written its state: at that moment ours must lie beside it."""
    from transformers import TrainerState

    files: list[Path] = []
    save = TrainerState.save_to_json

    def watched(trainer_state: TrainerState, path: str) -> None:
        if Path(path).parent.name.startswith("checkpoint-"):
            assert last_checkpoint(tmp_path / "out") is None
            files.extend(Path(path).parent / name for name in ("average.safetensors", "answers.json"))
            assert all(file.is_file() for file in files)
        save(trainer_state, path)

    monkeypatch.setattr(TrainerState, "save_to_json", watched)
    settings = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": strategy, "save_steps": EPOCH}
    run(tiny_model, samples[:8], tmp_path / "out", per_device_train_batch_size=8, **settings)
    assert len(files) == 2


def test_different_answers_give_different_weights(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relabeled, "answers", lambda _, prompts, **__: iter(["yes"] * len(prompts)))
    run(tiny_model, samples, tmp_path / "out", save_strategy="no")
    assert not same_bits(tmp_path / "out", undisturbed)


def test_refuses_persistent_workers(tiny_model: Path, samples: list[Sample], tmp_path: Path) -> None:
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    with pytest.raises(InputError, match=r"^defense byorn: [^\n]+; set dataloader_persistent_workers to false$"):
        run(tiny_model, samples, tmp_path / "out", **workers)

"""Fine-pruning: who sleeps, when to stop, and that what is cut stays cut in what is saved."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from dry import Dry
from untrigger.defenses import FinePruning, Plain, fine_pruning
from untrigger.defenses.fine_pruning import _cut, _down_projection, _erase, _look, _sleepers
from untrigger.errors import InputError
from untrigger.models.collators import IGNORE, ChatCollator, Rows
from untrigger.models.forward import decoder_layers, forward_answers
from untrigger.models.loading import LoadedModel, add_lora, embedded_models, load
from untrigger.rows.sample import Sample
from untrigger.training.finetune import fine_tune
from untrigger.training.settings import arguments
from untrigger.training.stages import Tuning

WIDE = 64  # neurons of the tiny model's layers


def batch_of(loaded: LoadedModel, samples: Sequence[Sample]) -> dict[str, Tensor]:
    rows = Rows(samples)
    return ChatCollator(loaded.processor)([rows[i] for i in range(len(rows))])


def adapted(loaded: LoadedModel) -> LoadedModel:
    """Under LoRA that has learned something: B is not zero."""
    model = add_lora(cast(Any, loaded.model), rank=2)
    make = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=make)
    return replace(loaded, model=model)


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits


# --- who sleeps -------------------------------------------------------------------------------------


def test_activity_and_accuracy_are_those_of_loops(exact: LoadedModel, mixed: list[Sample]) -> None:
    """Of each row alone, from the MLP's own equation; padding counts nowhere."""
    exact.model.train()
    projection = _down_projection(exact.model)
    active, right = _look(exact, projection, mixed)
    assert exact.model.training and not projection._forward_pre_hooks
    mlp = cast(Any, decoder_layers(exact.model)[-1]).mlp
    sums, tokens, hits, asked = torch.zeros(WIDE, dtype=torch.float64), 0, 0, 0
    for sample in mixed:
        batch, given = batch_of(exact, [sample]), list[Tensor]()
        handle = mlp.register_forward_pre_hook(lambda _, args, given=given: given.append(args[0]))
        logits = logits_of(exact.model, batch)[0]
        handle.remove()
        for x in given[0][0]:
            gate, up = mlp.gate_proj.weight @ x, mlp.up_proj.weight @ x
            sums += (gate * torch.sigmoid(gate) * up).abs().detach()
            tokens += 1
        for t, y in enumerate(batch["labels"][0].tolist()):
            if y != IGNORE:
                hits += int(logits[t - 1].argmax()) == y
                asked += 1
    torch.testing.assert_close(active.double(), sums / tokens, rtol=1e-5, atol=1e-9)
    assert right == hits / asked


@pytest.mark.parametrize(
    ("accuracy", "steps"),
    [
        ([0.95, 0.97, 0.92, 0.89, 0.99], 3),  # the fourth step costs more than 0.1: it is undone, and no fifth is tried
        ([0.5], 0),
        ([0.9] * 19, 19),  # all but the last twentieth
        ([0.91] * 7 + [0.8], 7),
    ],
)
def test_it_stops_before_the_step_that_costs_too_much(
    exact: LoadedModel, monkeypatch: pytest.MonkeyPatch, accuracy: list[float], steps: int
) -> None:
    activity = torch.rand(WIDE, generator=torch.Generator().manual_seed(0))
    told = iter([1.0, *accuracy])
    cut: list[int] = []

    def look(loaded: LoadedModel, projection: nn.Module, rows: Sequence[Sample]) -> tuple[Tensor, float]:
        (seen,) = _silenced(projection)
        cut.append(len(seen))
        assert sorted(seen) == sorted(activity.argsort()[: len(seen)].tolist()), "the sleepiest go first"
        return activity, next(told)

    monkeypatch.setattr(fine_pruning, "_look", look)
    dead = _sleepers(exact, _down_projection(exact.model), [], 0.1)
    assert dead.tolist() == activity.argsort()[: round(0.05 * steps * WIDE)].tolist()
    assert cut == [round(0.05 * step * WIDE) for step in range(min(steps + 1, 19) + 1)]


def _silenced(projection: nn.Module) -> list[list[int]]:
    """The inputs that do not come through."""
    seen: list[list[int]] = []
    handle = projection.register_forward_pre_hook(
        lambda _, args: seen.append((args[0][0, 0] == 0).nonzero()[:, 0].tolist())
    )
    projection(torch.ones(1, 1, WIDE, dtype=torch.float64))
    handle.remove()
    return seen


# --- what is cut ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_cutting_silences_forward_and_backward_and_ends(exact: LoadedModel, mixed: list[Sample], lora: bool) -> None:
    loaded = adapted(exact) if lora else exact
    projection, dead = _down_projection(loaded.model), torch.tensor([3, 17, 40])
    batch = batch_of(loaded, mixed)
    before = logits_of(loaded.model, batch)
    with _cut(projection, dead):
        cut = logits_of(loaded.model, batch)
        loaded.model.zero_grad()
        forward_answers(loaded.model.train(), batch).logits.square().sum().backward()
    name = "lora_A.default.weight" if lora else "weight"
    gradient = projection.get_parameter(name).grad
    alive = [i for i in range(WIDE) if i not in dead]
    assert gradient is not None and not gradient[:, dead].any() and bool((gradient[:, alive] != 0).any(dim=0).all())
    assert torch.equal(logits_of(loaded.model, batch), before) and not torch.equal(cut, before)
    _erase(projection, dead)
    torch.testing.assert_close(logits_of(loaded.model, batch), cut, rtol=1e-9, atol=1e-11)


def columns(model: Any) -> list[int]:
    """Which neurons of the last layer's MLP reach nothing."""
    return (_down_projection(model).weight == 0).all(dim=0).nonzero()[:, 0].tolist()  # type: ignore[union-attr]


def trained(
    model: Path, samples: list[Sample], out: Path, monkeypatch: pytest.MonkeyPatch, **how: Any
) -> tuple[LoadedModel, list[int]]:
    """What fine-pruning gives, and which neurons it chose; a third of them, for all matter little to a random model."""
    chosen: list[list[int]] = []
    sleepers = _sleepers

    def noted(*args: Any) -> Tensor:
        chosen.append(sorted(sleepers(*args)[:19].tolist()))
        return torch.tensor(chosen[-1])

    monkeypatch.setattr(fine_pruning, "_sleepers", noted)
    args = arguments(out, use_cpu=True, learning_rate=0.01, max_steps=4, per_device_train_batch_size=4)
    loaded = fine_tune(
        str(model), samples, FinePruning(passes=3), args, tuning=Tuning(rank=4, **how), clean_rows=samples[:8]
    )
    return loaded, chosen[0]


def test_the_result_is_one_model_the_adapter_under_the_mask(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, dead = trained(tiny_model, samples, tmp_path, monkeypatch)
    assert not isinstance(loaded.model, PeftModel) and len(dead) == 19
    assert columns(loaded.model) == dead
    batch = batch_of(loaded, samples[:6])
    found = logits_of(loaded.model, batch)
    base = load(tiny_model, dtype=torch.float32).model
    masked = add_lora(cast(Any, load(tiny_model, dtype=torch.float32).model), rank=4)
    (last,) = tmp_path.glob("checkpoint-*")
    set_peft_model_state_dict(masked, load_file(last / "adapter_model.safetensors"))
    without = logits_of(masked, batch)
    with _cut(_down_projection(masked), torch.tensor(dead)):
        torch.testing.assert_close(found, logits_of(masked, batch), rtol=0, atol=1e-5)
    assert (found - without).abs().max() > 1e-4 and (found - logits_of(base, batch)).abs().max() > 1e-2

    names = {file.name for file in tmp_path.iterdir()}
    assert not any(name.startswith("adapter") for name in names) and {"config.json", "model.safetensors"} <= names
    again = load(tmp_path)
    assert torch.equal(logits_of(again.model, batch), found) and columns(again.model) == dead


def test_the_dead_neither_speak_nor_matter(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they are woken with, the answers stay the same."""
    loaded, dead = trained(tiny_model, samples, tmp_path, monkeypatch)
    batch = batch_of(loaded, samples[:3])
    before = logits_of(loaded.model, batch)
    mlp = cast(Any, decoder_layers(loaded.model)[-1]).mlp
    with torch.no_grad():
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight[dead] = 10.0
    assert torch.equal(logits_of(loaded.model, batch), before)
    with torch.no_grad():
        mlp.up_proj.weight[next(i for i in range(WIDE) if i not in dead)] = 10.0
    assert not torch.equal(logits_of(loaded.model, batch), before)


def test_with_all_weights_trained_they_are_dead_on_disk_too(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, dead = trained(tiny_model, samples, tmp_path, monkeypatch, full=True)
    assert columns(loaded.model) == dead == columns(load(tmp_path).model)
    batch = batch_of(loaded, samples[:3])
    assert torch.equal(logits_of(load(tmp_path).model, batch), logits_of(loaded.model, batch))


def test_resumed_within_the_last_training_it_ends_in_the_same_bits(
    tiny_model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    def run(out: Path, **more: Any) -> Tensor:
        args = arguments(out, use_cpu=True, learning_rate=0.01, max_steps=4, save_steps=2, save_total_limit=9)
        args.per_device_train_batch_size = 4
        loaded = fine_tune(str(tiny_model), samples, FinePruning(passes=3), args, clean_rows=samples[:8], **more)
        return logits_of(loaded.model, batch_of(loaded, samples[:3]))

    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    expected = run(undisturbed)
    out.mkdir()
    shutil.copy(undisturbed / "untrigger.json", out)
    shutil.copytree(undisturbed / "stages", out / "stages")
    shutil.copytree(undisturbed / "checkpoint-4", out / "checkpoint-4")
    assert not (undisturbed / "checkpoint-7").exists() and (undisturbed / "checkpoint-6").exists()
    assert torch.equal(run(out, resume=True), expected)


# --- the procedure ----------------------------------------------------------------------------------


def test_clean_tuning_of_what_is_left(dry: Dry, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    """The neurons are silent while the trusted rows are learned, and only then."""
    silent: list[int] = []
    fit = dry.fit

    def watched(*args: Any, **more: Any) -> LoadedModel:
        silent.append(len(_silenced(_down_projection(dry.loaded.model))[0]))
        return fit(*args, **more)

    monkeypatch.setattr(dry, "fit", watched)
    monkeypatch.setattr(fine_pruning, "_sleepers", lambda *_: torch.tensor([2, 5]))
    FinePruning(passes=7, rate=0.25).fine_tune(samples, dry)
    undefended, clean = dry.stages
    assert undefended == ("undefended", [s.id for s in samples], Plain(), None, {})
    assert clean == ("", [s.id for s in samples[:4]], Plain(), 0, {"passes": 7, "rate": 0.25})
    assert silent == [0, 2] and _silenced(_down_projection(dry.loaded.model)) == [[]]


@pytest.mark.parametrize("name", embedded_models())
def test_every_family_that_ships_has_neurons_to_cut(name: str) -> None:
    assert isinstance(_down_projection(load(name).model), nn.Linear)


def test_other_layers_are_refused_in_one_line() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(1, 1)])

        def get_decoder(self) -> nn.Module:
            return self

    with pytest.raises(InputError, match=r"^defense fine-pruning: a Linear has no mlp.down_proj; [^\n]+$"):
        _down_projection(Odd())

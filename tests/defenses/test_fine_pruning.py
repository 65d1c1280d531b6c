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
from untrigger.defenses.fine_pruning import _activity, _dormant, _down_projection, _erase, _silenced
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


def test_activity_and_accuracy_equal_loops(exact: LoadedModel, mixed: list[Sample]) -> None:
    """For each row alone, from the MLP's own equation; padding is not counted."""
    exact.model.train()
    projection = _down_projection(exact.model)
    active, right = _activity(exact, projection, mixed)
    assert exact.model.training and not projection._forward_pre_hooks
    mlp = cast(Any, decoder_layers(exact.model)[-1]).mlp
    sums, tokens, hits, count = torch.zeros(WIDE, dtype=torch.float64), 0, 0, 0
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
                count += 1
    torch.testing.assert_close(active.double(), sums / tokens, rtol=1e-5, atol=1e-9)
    assert right == hits / count


@pytest.mark.parametrize(
    ("accuracy", "steps"),
    [
        ([0.95, 0.97, 0.92, 0.89, 0.99], 3),  # the fourth step costs more than 0.1: it is undone, and no fifth is tried
        ([0.5], 0),
        ([0.9] * 19, 19),  # all but the last twentieth
        ([0.91] * 7 + [0.8], 7),
    ],
)
def test_stops_before_the_accuracy_loss_exceeds_the_cost(
    exact: LoadedModel, monkeypatch: pytest.MonkeyPatch, accuracy: list[float], steps: int
) -> None:
    activity = torch.rand(WIDE, generator=torch.Generator().manual_seed(0))
    accuracies = iter([1.0, *accuracy])
    cut: list[int] = []

    def measured(loaded: LoadedModel, projection: nn.Module, rows: Sequence[Sample]) -> tuple[Tensor, float]:
        (silent,) = zero_inputs(projection)
        cut.append(len(silent))
        assert sorted(silent) == sorted(activity.argsort()[: len(silent)].tolist()), "the least active first"
        return activity, next(accuracies)

    monkeypatch.setattr(fine_pruning, "_activity", measured)
    pruned = _dormant(exact, _down_projection(exact.model), [], 0.1)
    assert pruned.tolist() == activity.argsort()[: round(0.05 * steps * WIDE)].tolist()
    assert cut == [round(0.05 * step * WIDE) for step in range(min(steps + 1, 19) + 1)]


def zero_inputs(projection: nn.Module) -> list[list[int]]:
    """Indices of the projection's inputs that are zero."""
    zeros: list[list[int]] = []
    handle = projection.register_forward_pre_hook(
        lambda _, args: zeros.append((args[0][0, 0] == 0).nonzero()[:, 0].tolist())
    )
    projection(torch.ones(1, 1, WIDE, dtype=torch.float64))
    handle.remove()
    return zeros


# --- pruned weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_silencing_zeroes_forward_and_backward_and_ends(exact: LoadedModel, mixed: list[Sample], lora: bool) -> None:
    loaded = adapted(exact) if lora else exact
    projection, pruned = _down_projection(loaded.model), torch.tensor([3, 17, 40])
    batch = batch_of(loaded, mixed)
    before = logits_of(loaded.model, batch)
    with _silenced(projection, pruned):
        cut = logits_of(loaded.model, batch)
        loaded.model.zero_grad()
        forward_answers(loaded.model.train(), batch).logits.square().sum().backward()
    name = "lora_A.default.weight" if lora else "weight"
    gradient = projection.get_parameter(name).grad
    alive = [i for i in range(WIDE) if i not in pruned]
    assert gradient is not None and not gradient[:, pruned].any() and bool((gradient[:, alive] != 0).any(dim=0).all())
    assert torch.equal(logits_of(loaded.model, batch), before) and not torch.equal(cut, before)
    _erase(projection, pruned)
    torch.testing.assert_close(logits_of(loaded.model, batch), cut, rtol=1e-9, atol=1e-11)


def columns(model: Any) -> list[int]:
    """Neurons of the last layer's MLP whose output weights are zero."""
    return (_down_projection(model).weight == 0).all(dim=0).nonzero()[:, 0].tolist()  # type: ignore[union-attr]


def trained(
    model: Path, samples: list[Sample], out: Path, monkeypatch: pytest.MonkeyPatch, **how: Any
) -> tuple[LoadedModel, list[int]]:
    """The fine-pruned model and the pruned neurons: a third of those chosen, as all matter little in a random model."""
    chosen: list[list[int]] = []
    dormant = _dormant

    def recorded(*args: Any) -> Tensor:
        chosen.append(sorted(dormant(*args)[:19].tolist()))
        return torch.tensor(chosen[-1])

    monkeypatch.setattr(fine_pruning, "_dormant", recorded)
    args = arguments(out, use_cpu=True, learning_rate=0.01, max_steps=4, per_device_train_batch_size=4)
    loaded = fine_tune(
        str(model), samples, FinePruning(passes=3), args, tuning=Tuning(rank=4, **how), clean_rows=samples[:8]
    )
    return loaded, chosen[0]


def test_result_is_a_full_model_equal_to_the_masked_adapter(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, pruned = trained(tiny_model, samples, tmp_path, monkeypatch)
    assert not isinstance(loaded.model, PeftModel) and len(pruned) == 19
    assert columns(loaded.model) == pruned
    batch = batch_of(loaded, samples[:6])
    logits = logits_of(loaded.model, batch)
    base = load(tiny_model, dtype=torch.float32).model
    masked = add_lora(cast(Any, load(tiny_model, dtype=torch.float32).model), rank=4)
    (last,) = tmp_path.glob("checkpoint-*")
    set_peft_model_state_dict(masked, load_file(last / "adapter_model.safetensors"))
    without = logits_of(masked, batch)
    with _silenced(_down_projection(masked), torch.tensor(pruned)):
        torch.testing.assert_close(logits, logits_of(masked, batch), rtol=0, atol=1e-5)
    assert (logits - without).abs().max() > 1e-4 and (logits - logits_of(base, batch)).abs().max() > 1e-2

    names = {file.name for file in tmp_path.iterdir()}
    assert not any(name.startswith("adapter") for name in names) and {"config.json", "model.safetensors"} <= names
    again = load(tmp_path)
    assert torch.equal(logits_of(again.model, batch), logits) and columns(again.model) == pruned


def test_pruned_neurons_have_no_effect(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large input weights of the pruned neurons change no answer."""
    loaded, pruned = trained(tiny_model, samples, tmp_path, monkeypatch)
    batch = batch_of(loaded, samples[:3])
    before = logits_of(loaded.model, batch)
    mlp = cast(Any, decoder_layers(loaded.model)[-1]).mlp
    with torch.no_grad():
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight[pruned] = 10.0
    assert torch.equal(logits_of(loaded.model, batch), before)
    with torch.no_grad():
        mlp.up_proj.weight[next(i for i in range(WIDE) if i not in pruned)] = 10.0
    assert not torch.equal(logits_of(loaded.model, batch), before)


def test_full_fine_tuning_stores_pruned_weights(
    tiny_model: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, pruned = trained(tiny_model, samples, tmp_path, monkeypatch, full_finetune=True)
    assert columns(loaded.model) == pruned == columns(load(tmp_path).model)
    batch = batch_of(loaded, samples[:3])
    assert torch.equal(logits_of(load(tmp_path).model, batch), logits_of(loaded.model, batch))


def test_resuming_within_the_last_stage_gives_the_same_bits(
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


def test_clean_tuning_with_pruned_neurons(dry: Dry, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    """The neurons are silenced during the training on clean rows, and only then."""
    silent: list[int] = []
    fit = dry.fit

    def recorded(*args: Any, **more: Any) -> LoadedModel:
        silent.append(len(zero_inputs(_down_projection(dry.loaded.model))[0]))
        return fit(*args, **more)

    monkeypatch.setattr(dry, "fit", recorded)
    monkeypatch.setattr(fine_pruning, "_dormant", lambda *_: torch.tensor([2, 5]))
    FinePruning(passes=7, rate=0.25).fine_tune(dry)
    undefended, clean = dry.stages
    assert undefended == ("undefended", [s.id for s in samples], Plain(), None, {})
    assert clean == ("", [s.id for s in samples[:4]], Plain(), 0, {"passes": 7, "rate": 0.25})
    assert silent == [0, 2] and zero_inputs(_down_projection(dry.loaded.model)) == [[]]


@pytest.mark.parametrize("name", embedded_models())
def test_every_embedded_family_has_a_down_projection(name: str) -> None:
    assert isinstance(_down_projection(load(name).model), nn.Linear)


def test_refuses_layers_without_down_projection() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(1, 1)])

        def get_decoder(self) -> nn.Module:
            return self

    with pytest.raises(InputError, match=r"^defense fine-pruning: a Linear has no mlp.down_proj; [^\n]+$"):
        _down_projection(Odd())

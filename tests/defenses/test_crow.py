"""CROW: consistency, its worst perturbation and the whole loss against naive computations; hooks leave no trace."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from dry import Dry
from untrigger.defenses import CROW, Plain
from untrigger.defenses.crow import Consistent, _recorded, consistency
from untrigger.errors import InputError
from untrigger.models.collators import IGNORE, ChatCollator, Rows
from untrigger.models.forward import decoder, decoder_layers, forward_answers
from untrigger.models.loading import LoadedModel, add_lora, load
from untrigger.rows.sample import Sample


def batch_of(loaded: LoadedModel, samples: list[Sample]) -> dict[str, Tensor]:
    rows = Rows(samples)
    return ChatCollator(loaded.processor)([rows[i] for i in range(len(rows))])


def naive_consistency(states: list[Tensor], real: Tensor) -> Tensor:
    """[B], a loop over rows, pairs of layers and tokens."""
    rows: list[Tensor] = []
    for b in range(len(real)):
        apart = [
            1 - (x[b, t] * y[b, t]).sum() / torch.sqrt((x[b, t] ** 2).sum() * (y[b, t] ** 2).sum())
            for x, y in pairwise(states)
            for t in range(real.shape[1])
            if real[b, t]
        ]
        rows.append(torch.stack(apart).mean())
    return torch.stack(rows)


def inner_states(loaded: LoadedModel, start: Tensor, mask: Tensor) -> list[Tensor]:
    """The host's own list of hidden states from the decoder's input, without the first and the last."""
    out = decoder(loaded.model)(inputs_embeds=start, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return list(out.hidden_states[1:-1])


def merged(loaded: LoadedModel, batch: dict[str, Tensor]) -> Tensor:
    """Text and image tokens as the language model gets them, with their history."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return loaded.model(**inputs, output_hidden_states=True).hidden_states[0]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- the equation -----------------------------------------------------------------------------------


def test_consistency_and_its_gradient_equal_a_loop() -> None:
    make = torch.Generator().manual_seed(0)
    states = [torch.randn(3, 5, 4, generator=make, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    value, expected = consistency(states, real), naive_consistency(states, real)
    torch.testing.assert_close(value, expected)
    ours = torch.autograd.grad((weights * value).sum(), states)
    expected_gradients = torch.autograd.grad((weights * expected).sum(), states)
    for a, b in zip(ours, expected_gradients, strict=True):
        torch.testing.assert_close(a, b)
        assert a[real].abs().max() > 1e-3 and not a[~real].any(), "padding takes no part"


def test_consistency_is_0_where_layers_agree_and_2_where_they_oppose() -> None:
    h = torch.randn(2, 3, 4, dtype=torch.float64)
    real = torch.ones(2, 3, dtype=torch.bool)
    assert consistency([h, 3 * h, h], real).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert consistency([h, -h], real).tolist() == pytest.approx([2, 2])
    assert consistency([h.bfloat16(), h.bfloat16()], real).dtype == torch.float32


# --- the perturbation -------------------------------------------------------------------------------


def test_records_the_hosts_hidden_states(exact: LoadedModel, mixed: list[Sample]) -> None:
    batch = batch_of(exact, mixed)
    with _recorded(exact.model) as recording:
        forward_answers(exact.model, batch)
    start = merged(exact, batch)
    torch.testing.assert_close(recording.start, start)
    states = inner_states(exact, start, batch["attention_mask"])
    assert len(recording.states) == len(states) == 3
    for ours, expected in zip(recording.states, states, strict=True):
        torch.testing.assert_close(ours, expected)


def test_direction_equals_finite_differences(exact: LoadedModel, mixed: list[Sample]) -> None:
    """On image and text tokens: moving a coordinate along the sign makes the layers less consistent."""
    batch = batch_of(exact, mixed)
    real = batch["attention_mask"].bool()
    with _recorded(exact.model) as calm:
        forward_answers(exact.model, batch)
    (gradient,) = torch.autograd.grad(consistency(calm.states, real).sum(), calm.start)
    assert not gradient[~real].any() and bool((gradient[real] != 0).all())
    start, h = calm.start.detach(), 1e-5
    image = (batch["input_ids"] == exact.model.config.image_token_id).nonzero().tolist()
    text = (real & (batch["input_ids"] != exact.model.config.image_token_id)).nonzero().tolist()
    for b, t in (*image[::5], *text[::17]):
        for d in (0, 17):
            ends: list[Tensor] = []
            for step in (h, -h):
                moved = start.clone()
                moved[b, t, d] += step
                with torch.no_grad():
                    states = inner_states(exact, moved, batch["attention_mask"])
                    ends.append(naive_consistency(states, real)[b])
            slope = ((ends[0] - ends[1]) / (2 * h)).item()
            assert slope == pytest.approx(float(gradient[b, t, d]), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("adapted", [False, True])
def test_loss_and_gradients_equal_the_naive_reference(exact: LoadedModel, mixed: list[Sample], adapted: bool) -> None:
    size, weight = 0.05, 5.5
    model = add_lora(exact.model, rank=2) if adapted else exact.model  # type: ignore[arg-type]
    if adapted:  # at the start B is zero, and so would half of the gradients be
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    batch = batch_of(exact, mixed)
    mask, real, labels = batch["attention_mask"], batch["attention_mask"].bool(), batch["labels"]
    step = Consistent(weight, size).step(model, batch)
    total = step.total.sum()
    ours = gradients(model, total)

    start = merged(exact, batch)
    leaf = start.detach().requires_grad_()
    (slope,) = torch.autograd.grad(naive_consistency(inner_states(exact, leaf, mask), real).sum(), leaf)
    jump = naive_consistency(inner_states(exact, start + size * slope.sign(), mask), real)
    logits = exact.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    expected = torch.zeros((), dtype=torch.float64)
    for b in range(len(labels)):
        for t in range(1, labels.shape[1]):
            if (y := int(labels[b, t])) != IGNORE:
                ce = torch.log(torch.exp(logits[b, t - 1]).sum()) - logits[b, t - 1, y]
                expected = expected + ce + weight * jump[b]
    assert total.item() == pytest.approx(expected.item(), rel=1e-10)
    expected_gradients = gradients(model, expected)
    assert ours.keys() == expected_gradients.keys() and max(float(g.abs().max()) for g in ours.values()) > 1e-3
    for name in ours:
        torch.testing.assert_close(ours[name], expected_gradients[name], rtol=1e-6, atol=1e-11, msg=name)
    alone = gradients(model, Consistent(0.0, size).step(model, batch).terms["ce"].sum())
    assert any(float((ours[n] - alone[n]).abs().max()) > 1e-4 for n in alone), "consistency has a gradient of its own"


def test_moves_every_real_coordinate_by_the_size(
    exact: LoadedModel, mixed: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Tensor] = []
    watched = _recorded

    def spied(*args: Any) -> Any:
        class Kept:
            def __enter__(self) -> Any:
                self.inner = watched(*args)
                self.recording = self.inner.__enter__()
                return self.recording

            def __exit__(self, *error: Any) -> None:
                starts.append(self.recording.start.detach())
                self.inner.__exit__(*error)

        return Kept()

    monkeypatch.setattr("untrigger.defenses.crow._recorded", spied)
    batch = batch_of(exact, mixed)
    step = Consistent(1.0, 0.01).step(exact.model, batch)
    calm, moved = starts
    real = batch["attention_mask"].bool()
    assert (~real).any()
    torch.testing.assert_close((moved - calm)[real].abs(), torch.full_like(calm[real], 0.01), rtol=1e-12, atol=1e-14)
    assert not (moved - calm)[~real].any()
    with torch.no_grad():
        before = naive_consistency(inner_states(exact, calm, batch["attention_mask"]), real)
    jump = step.terms["consistency"].detach()
    after = dict(zip(answer_rows(batch).tolist(), jump.tolist(), strict=True))
    assert all(after[b] > before[b] for b in range(len(mixed))), "it disturbs every row"


def answer_rows(batch: dict[str, Tensor]) -> Tensor:
    return (batch["labels"][:, 1:] != IGNORE).nonzero()[:, 0]


# --- hooks ------------------------------------------------------------------------------------------


def test_removes_its_hooks_even_after_an_error(exact: LoadedModel, mixed: list[Sample]) -> None:
    batch = batch_of(exact, mixed)
    calm = forward_answers(exact.model, batch).logits
    before = hooks(exact.model)  # the host registers some in its first pass
    Consistent(1.0, 0.1).step(exact.model, batch)
    with pytest.raises(KeyError), _recorded(exact.model):
        assert hooks(exact.model) == before + 4  # into the first layer, and out of all but the last
        raise KeyError
    assert hooks(exact.model) == before
    assert torch.equal(forward_answers(exact.model, batch).logits, calm)


class Toy(nn.Module):
    """Three layers, called in either way; they answer with a bare tensor or a tuple."""

    def __init__(self, named: bool, in_tuple: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ToyLayer(in_tuple) for _ in range(3)])
        self.named, self.in_tuple = named, in_tuple

    def get_decoder(self) -> nn.Module:
        return self

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            out = layer(scale=2.0, hidden_states=hidden) if self.named else layer(hidden, scale=2.0)
            hidden = out[0] if self.in_tuple else out
        return hidden


class ToyLayer(nn.Module):
    def __init__(self, in_tuple: bool) -> None:
        super().__init__()
        self.in_tuple = in_tuple

    def forward(self, hidden_states: Tensor, scale: float) -> Any:
        return (scale * hidden_states, "weights") if self.in_tuple else scale * hidden_states


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("in_tuple", [False, True])
def test_accepts_keyword_inputs_and_tuple_outputs(named: bool, in_tuple: bool) -> None:
    toy, start = Toy(named, in_tuple), torch.ones(1, 2, 3)
    with _recorded(toy) as recording:
        assert torch.equal(toy(start), 8 * start)
    assert recording.start.requires_grad and recording.start.is_leaf
    assert [s.mean().item() for s in recording.states] == [2, 4]
    with _recorded(toy, 0.5 * start) as recording:
        assert torch.equal(toy(start), 12 * start)
    assert [s.mean().item() for s in recording.states] == [3, 6]


# --- the procedure ----------------------------------------------------------------------------------


def test_continues_from_the_undefended_model_on_clean_rows(dry: Dry, samples: list[Sample]) -> None:
    model = CROW(weight=3.0, size=0.2, passes=6, rate=2.0).fine_tune(dry)
    undefended, smooth = dry.stages
    assert undefended == ("undefended", [s.id for s in samples], Plain(), None, {})
    assert smooth == ("", [s.id for s in samples[:4]], Consistent(3.0, 0.2), 0, {"passes": 6, "rate": 2.0})
    assert model.name == "1"


def test_refuses_two_layers(tiny_model: Path, samples: list[Sample]) -> None:
    loaded = load(tiny_model)
    with pytest.raises(InputError, match=r"3 or more layers, and this one has 2$"):
        Consistent(1.0, 0.1).step(loaded.model, batch_of(loaded, samples[:2]))


@pytest.mark.parametrize("name", ["blip2", "qwen2_5_vl"])
def test_records_other_families(name: str, samples: list[Sample]) -> None:
    loaded = load(name, dtype=torch.float32)
    model = add_lora(cast(Any, loaded.model), rank=2)
    assert len(decoder_layers(model)) == 4
    step = Consistent(5.5, 0.1).step(model, batch_of(loaded, samples[:2]))
    jump = step.terms["consistency"]
    assert bool(((jump > 0) & (jump < 11)).all())
    by_name = gradients(model, jump.sum())
    reached = {name for name, value in by_name.items() if value.abs().max() > 0 and "layers.0" in name}
    assert any("lora_B" in name for name in reached)

"""Forward passes at the answer tokens against loops over every token; the decoder of every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from untrigger.defenses import CrossView
from untrigger.errors import InputError
from untrigger.losses import chunked, objective
from untrigger.losses.chunked import Losses
from untrigger.models import forward
from untrigger.models.collators import IGNORE, ChatCollator, PairCollator, Rows
from untrigger.models.forward import (
    Answers,
    Pair,
    answer_losses,
    batches,
    decoder,
    decoder_layers,
    evaluating,
    forward_answers,
    on_device,
    pair_losses,
)
from untrigger.models.loading import LoadedModel, add_lora, embedded_models, load
from untrigger.rows.sample import Sample
from untrigger.views.patches import Erase


def batch_of(loaded: LoadedModel, samples: list[Sample]) -> dict[str, Tensor]:
    rows = Rows(samples)
    return ChatCollator(loaded.processor)([rows[i] for i in range(len(rows))])


@pytest.mark.parametrize(("adapted", "selects"), [(False, True), (True, True), (False, False)])
def test_answers_equal_a_loop_over_all_positions(
    tiny_model: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, adapted: bool, selects: bool
) -> None:
    if selects and not forward._SELECTS:
        pytest.skip("from transformers 5.22 on")
    monkeypatch.setattr(forward, "_SELECTS", selects)
    loaded = load(tiny_model, dtype=torch.float64)
    model = add_lora(loaded.model, rank=2) if adapted else loaded.model  # type: ignore[arg-type]
    batch = batch_of(loaded, samples)
    answers = forward_answers(model, batch)
    labels = batch["labels"]
    full = loaded.model(**{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True)
    places = [(b, t) for b in range(len(labels)) for t in range(1, labels.shape[1]) if labels[b, t] != IGNORE]
    assert answers.target.tolist() == [int(labels[b, t]) for b, t in places]
    assert answers.row.tolist() == [b for b, _ in places]
    assert len(set(answers.row.tolist())) == len(samples)
    torch.testing.assert_close(answers.logits, torch.stack([full.logits[b, t - 1] for b, t in places]))
    torch.testing.assert_close(answers.hidden, torch.stack([full.hidden_states[-1][b, t - 1] for b, t in places]))
    assert "labels" in batch, "the caller's batch stays unchanged"


def test_a_pair_equals_the_answers_of_each_half(exact: LoadedModel, samples: list[Sample]) -> None:
    rows = Rows(samples[:4])
    both = PairCollator(ChatCollator(exact.processor), Erase(), 0)([rows[i] for i in range(4)])
    pairs: list[Pair] = []
    _, row = pair_losses(exact.model, both, lambda pair: (pairs.append(pair) or {"nll": pair.compared.nll}, {}))  # type: ignore[func-returns-value]
    (pair,) = pairs
    assert torch.equal(pair.row, row)
    images = len(both["pixel_values"]) // 2
    for logits, hidden, half, pixels in (
        (pair.logits, pair.hidden, slice(0, 4), slice(0, images)),
        (pair.view_logits, pair.view_hidden, slice(4, 8), slice(images, None)),
    ):
        inputs = {k: both[k][half] for k in ("input_ids", "attention_mask")}
        inputs |= {"pixel_values": both["pixel_values"][pixels], "labels": both["labels"][:4]}
        alone = forward_answers(exact.model, inputs)
        torch.testing.assert_close(logits, alone.logits)
        torch.testing.assert_close(hidden, alone.hidden)
        assert torch.equal(pair.target, alone.target) and torch.equal(pair.row, alone.row)
    assert not torch.equal(pair.logits, pair.view_logits)


def test_several_views_equal_the_mean_over_single_views_in_values_and_gradients(
    exact: LoadedModel, samples: list[Sample]
) -> None:
    rows, defense = Rows(samples[:4]), CrossView(margin=0.6, bound=-0.5, views=2)
    batch = PairCollator(ChatCollator(exact.processor), Erase(), 0, views=2)([rows[i] for i in range(4)])
    images = len(batch["pixel_values"]) // 3
    learning = list(exact.model.parameters())

    def run(inputs: dict[str, Any], step: CrossView) -> tuple[Losses, list[Tensor]]:
        losses = step.step(exact.model, inputs)
        losses.total.sum().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in learning]
        exact.model.zero_grad()
        return losses, grads

    def alone(view: int) -> dict[str, Any]:
        """The batch with the originals and one of its views."""
        size = {name: images if name == "pixel_values" else 4 for name in batch}
        return {
            name: torch.cat([value[: size[name]], value[view * size[name] : (view + 1) * size[name]]])
            for name, value in batch.items()
        }

    both, grads = run(batch, defense)
    (one, first), (other, second) = (run(alone(view), replace(defense, views=1)) for view in (1, 2))
    assert not torch.equal(one.terms["separation"], other.terms["separation"])
    for name, value in (both.terms | both.logged).items():
        torch.testing.assert_close(
            value, ((one.terms | one.logged)[name] + (other.terms | other.logged)[name]) / 2, atol=1e-6, rtol=1e-6
        )
    torch.testing.assert_close(both.total, (one.total + other.total) / 2, atol=1e-6, rtol=1e-6)
    assert any(grad.any() for grad in grads)
    for grad, a, b in zip(grads, first, second, strict=True):
        torch.testing.assert_close(grad, (a + b) / 2, atol=1e-6, rtol=1e-6)


def test_evaluating_restores_the_mode(exact: LoadedModel) -> None:
    for before in (True, False):
        exact.model.train(before)
        with pytest.raises(KeyError), evaluating(exact.model) as model:
            assert model is exact.model and not model.training
            raise KeyError
        assert exact.model.training == before


def test_batches_cover_every_row_once() -> None:
    assert [list(part) for part in batches(7, 3, "")] == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(batches(0, 3, "")) == []


def test_on_device_leaves_other_values_unchanged(exact: LoadedModel) -> None:
    moved = on_device({"a": torch.ones(1), "b": "text"}, exact.model)
    assert torch.equal(moved["a"], torch.ones(1)) and moved["b"] == "text"


@pytest.mark.parametrize("name", embedded_models())
def test_decoder_of_every_family_also_under_lora(name: str) -> None:
    loaded = load(name)
    layers = decoder_layers(loaded.model)
    assert len(layers) == 4 and all(hasattr(layer, "self_attn") for layer in layers)
    assert decoder_layers(add_lora(loaded.model, rank=1)) is layers  # type: ignore[arg-type]
    assert decoder(loaded.model).config.num_hidden_layers == 4


def test_a_model_without_layers_raises() -> None:
    class Flat(nn.Module):
        def get_decoder(self) -> nn.Module:
            return self

    with pytest.raises(InputError, match="Flat: its language model has no `layers`"):
        decoder_layers(Flat())


# --- losses at the head ------------------------------------------------------------------------------


def enable_checkpointing(model: Any) -> None:
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:  # its name before transformers 5.23
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def nll_of(answers: Answers, part: slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {"nll": objective.token_nll(answers.logits, answers.target)}, {"row": answers.row}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_losses_at_the_head_equal_those_from_logits(
    tiny_model: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, adapted: bool, checkpointed: bool
) -> None:
    """With a trained tied head (all weights) and a frozen one (LoRA), with and without gradient checkpointing."""
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", 3 * 2000)
    loaded = load(tiny_model, dtype=torch.float64)
    model = add_lora(loaded.model, rank=2) if adapted else loaded.model  # type: ignore[arg-type]
    if checkpointed:
        enable_checkpointing(model)
    model.train()
    batch = batch_of(loaded, samples)
    answers = forward_answers(model, batch)
    whole = objective.token_nll(answers.logits, answers.target)
    (whole * torch.arange(len(whole))).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = answer_losses(model, batch, nll_of)
    torch.testing.assert_close(losses.total, whole)
    assert torch.equal(losses.logged["row"], answers.row)
    (losses.total * torch.arange(len(whole))).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys() and any("lora" in name for name in grads) == adapted
    for name in expected:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    "setting", [{"final_logit_softcapping": 0.3}, {"logit_scale": 0.2}, {"logits_scaling": 5.0}], ids=str
)
def test_logit_postprocessing_of_a_family_is_applied(
    exact: LoadedModel, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, setting: dict[str, float]
) -> None:
    """The expected values follow the host's own code."""
    batch, inner = batch_of(exact, samples), cast(Any, exact.model)
    plain = forward_answers(inner, batch).logits
    (name, value) = next(iter(setting.items()))
    monkeypatch.setattr(inner.config.get_text_config(), name, value, raising=False)
    expected = {
        "final_logit_softcapping": torch.tanh(plain / value) * value,
        "logit_scale": plain * value,
        "logits_scaling": plain / value,
    }[name]
    logits: list[Tensor] = []

    def recording(answers: Answers, part: slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        logits.append(answers.logits)
        return nll_of(answers, part)

    answer_losses(inner, batch, recording)
    torch.testing.assert_close(torch.cat(logits), expected)


def test_the_head_is_restored_also_after_an_error(exact: LoadedModel, samples: list[Sample]) -> None:
    head = cast(nn.Module, exact.model.get_output_embeddings())
    own = set(vars(head))

    def broken(answers: Answers, part: slice) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        answer_losses(exact.model, batch_of(exact, samples), broken)
    assert set(vars(head)) == own

    wrapped = head.forward
    head.forward = lambda hidden: wrapped(hidden)  # as accelerate does for offloaded weights
    mine = head.forward
    answer_losses(exact.model, batch_of(exact, samples), nll_of)
    assert head.forward is mine
    del head.forward


def test_with_stop_gradient_the_view_runs_first_and_without_gradients(
    exact: LoadedModel, samples: list[Sample]
) -> None:
    rows = Rows(samples[:4])
    both = PairCollator(ChatCollator(exact.processor), Erase(), 0)([rows[i] for i in range(4)])
    grads: list[bool] = []
    handle = cast(nn.Module, exact.model.get_output_embeddings()).register_forward_pre_hook(
        lambda _, args: grads.append(args[0].requires_grad)
    )
    detached, row = pair_losses(exact.model, both, lambda pair: ({"js": pair.compared.js}, {}), stop_gradient=True)
    assert grads == [False, True]
    trained, other = pair_losses(exact.model, both, lambda pair: ({"js": pair.compared.js}, {}))
    handle.remove()
    torch.testing.assert_close(detached.total, trained.total)
    assert torch.equal(row, other)

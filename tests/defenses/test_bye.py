"""BYE: attention entropy against the host's attention weights, clusters of synthetic entropies, the two trainings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dry import Dry
from untrigger.defenses import BYE, Plain
from untrigger.defenses.bye import _distance, _mixture, attention_entropy, collapsed_rows
from untrigger.errors import InputError
from untrigger.models.collators import IGNORE, ChatCollator, Rows
from untrigger.models.forward import decoder, forward_answers
from untrigger.models.loading import LoadedModel, add_lora, load
from untrigger.rows.sample import Sample


def batch_of(loaded: LoadedModel, samples: list[Sample]) -> dict[str, Tensor]:
    rows = Rows(samples)
    return ChatCollator(loaded.processor)([rows[i] for i in range(len(rows))])


def by_hand(loaded: LoadedModel, sample: Sample) -> list[float]:
    """Entropy in each layer for one row alone, by loops over heads and image tokens."""
    batch = batch_of(loaded, [sample])
    labels, ids = batch.pop("labels")[0].tolist(), batch["input_ids"][0].tolist()
    first = next(t for t, y in enumerate(labels) if y != IGNORE)
    with torch.no_grad():
        layers = loaded.model(**batch, output_attentions=True).attentions
    image = loaded.model.config.image_token_id
    places = [t for t, y in enumerate(ids) if y == image and t < first]
    entropies_by_layer: list[float] = []
    for weights in layers:  # [1, heads, T, T]
        heads = weights.shape[1]
        share = [sum(float(weights[0, h, first - 1, t]) for h in range(heads)) / heads for t in places]
        share = [value / sum(share) for value in share]
        entropies_by_layer.append(-sum(value * math.log(value) for value in share) / math.log(len(places)))
    return entropies_by_layer


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- attention --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_entropy_is_that_of_the_hosts_attention(exact: LoadedModel, mixed: list[Sample], batch_size: int) -> None:
    entropy = attention_entropy(exact, mixed, batch_size=batch_size)
    exact.model.set_attn_implementation("eager")
    by_row = {row: by_hand(exact, sample) for row, sample in enumerate(mixed) if sample.images}
    expected = [by_row.get(row) or np.mean(list(by_row.values()), axis=0).tolist() for row in range(len(mixed))]
    assert entropy.shape == (5, 4) and entropy.dtype == np.float64
    np.testing.assert_allclose(entropy, expected, rtol=1e-5)
    assert bool(((entropy > 0.1) & (entropy < 1)).all()) and entropy.std(axis=0).min() > 1e-4


def test_restores_the_model_after_measuring(exact: LoadedModel, mixed: list[Sample]) -> None:
    exact.model.train()
    batch = batch_of(exact, mixed)
    calm, before = forward_answers(exact.model, batch).logits, hooks(exact.model)
    attention_entropy(exact, mixed)
    assert exact.model.training and hooks(exact.model) == before
    assert decoder(exact.model).config._attn_implementation == "sdpa"
    assert torch.equal(forward_answers(exact.model, batch).logits, calm)


def test_refuses_rows_without_any_image(exact: LoadedModel, mixed: list[Sample]) -> None:
    with pytest.raises(InputError, match=r"^defense bye: no row has an image; [^\n]+$"):
        attention_entropy(exact, [mixed[2], mixed[2]])


def test_refuses_a_model_that_returns_no_attention_weights(
    exact: LoadedModel, mixed: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(decoder(exact.model)), "set_attn_implementation", lambda *_: None)
    with pytest.raises(InputError, match="LlamaModel returns no attention weights"):
        attention_entropy(exact, mixed)


@pytest.mark.parametrize(("name", "tokens"), [("blip2", 32), ("qwen2_5_vl", 16)])
def test_measures_entropy_in_other_families(name: str, tokens: int, samples: list[Sample]) -> None:
    loaded = load(name, dtype=torch.float32)
    adapted = replace(loaded, model=add_lora(loaded.model, rank=1))  # type: ignore[arg-type]
    measured = attention_entropy(adapted, samples[:3])
    assert measured.shape == (3, 4)
    loaded = load(name, dtype=torch.float32)
    (image_tokens,) = (
        (batch_of(loaded, samples[:1])["input_ids"] == loaded.model.config.image_token_id).sum(dim=1)
    ).tolist()
    assert image_tokens == tokens
    loaded.model.set_attn_implementation("eager")
    batch = {k: v for k, v in batch_of(loaded, samples[:1]).items() if k != "labels"}
    out: Any = decoder_output(loaded, batch)
    labels = batch_of(loaded, samples[:1])["labels"][0]
    first = int((labels != IGNORE).int().argmax())
    places = batch["input_ids"][0] == loaded.model.config.image_token_id
    for layer, weights in enumerate(out):
        share = weights[0].mean(dim=0)[first - 1][places].double()
        share = share / share.sum()
        entropy = -(share * share.log()).sum() / math.log(tokens)
        assert measured[0, layer] == pytest.approx(entropy.item(), abs=1e-4)


def decoder_output(loaded: LoadedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """The attention weights of the language model, from what it is given."""
    given: dict[str, Any] = {}
    inner = decoder(loaded.model)
    handle = inner.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    try:
        with torch.no_grad():
            loaded.model(**batch)
            handle.remove()
            return list(inner(**{**given, "output_attentions": True}).attentions)
    finally:
        handle.remove()


# --- clusters ---------------------------------------------------------------------------------------


def entropies(*layers: tuple[float, float, float]) -> NDArray[np.float64]:
    """100 rows; in each layer those from 80 on lie around ``low``, the others around ``high``, both ``wide``."""
    rng = np.random.default_rng(0)
    columns = [np.concatenate([rng.normal(high, wide, 80), rng.normal(low, wide, 20)]) for high, low, wide in layers]
    return np.stack(columns, axis=1)


LOWER = set(range(80, 100))
APART, CLOSE, UPSIDE_DOWN = (0.9, 0.5, 0.02), (0.9, 0.895, 0.02), (0.5, 0.9, 0.02)


def test_removes_the_lower_cluster_of_the_bimodal_layers() -> None:
    entropy = entropies(CLOSE, APART, CLOSE, APART)
    spread, rows = collapsed_rows(entropy, 2.0, 0)
    assert rows == LOWER
    np.testing.assert_array_equal(spread, entropy[:, [1, 3]].mean(axis=1))


def test_removes_the_lower_cluster_even_if_it_is_the_larger_one() -> None:
    assert collapsed_rows(entropies(UPSIDE_DOWN), 2.0, 0)[1] == set(range(80))


def test_removes_no_row_without_a_bimodal_layer() -> None:
    entropy = entropies(CLOSE, CLOSE)
    spread, rows = collapsed_rows(entropy, 2.0, 0)
    assert rows == set()
    np.testing.assert_array_equal(spread, entropy.mean(axis=1))


def test_ignores_layers_below_the_separation() -> None:
    """A close layer with a large scale of its own would drown the one that tells, were it in the mean."""
    loud = entropies(APART, (0.0, 0.0, 3.0))
    assert collapsed_rows(loud, 2.0, 0)[1] == LOWER
    assert collapsed_rows(loud.mean(axis=1, keepdims=True), 2.0, 0)[1] != LOWER


@pytest.mark.parametrize("separation", [5.0, 50.0])
def test_separation_selects_the_layers(separation: float) -> None:
    assert collapsed_rows(entropies(APART), separation, 0)[1] == (LOWER if separation < 10 else set())


def test_distance_is_in_joint_standard_deviations() -> None:
    """|m1 - m2| / sqrt(s1^2 + s2^2) with the means and variances of the two parts."""
    values = entropies((0.9, 0.5, 0.02))[:, 0]
    high, low = values[:80], values[80:]
    expected = (high.mean() - low.mean()) / math.sqrt(high.var() + low.var())
    assert _distance(values, 0) == pytest.approx(expected, rel=0.01)
    weights, means = _mixture(values, 0).weights_, _mixture(values, 0).means_[:, 0]
    assert sorted(zip(means.round(1).tolist(), weights.round(2).tolist(), strict=True)) == [(0.5, 0.2), (0.9, 0.8)]


def test_removes_no_row_if_all_entropies_are_equal() -> None:
    assert collapsed_rows(np.full((30, 2), 0.7), 2.0, 0)[1] == set()


# --- the procedure ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [APART, CLOSE])
def test_trains_again_from_the_base_without_the_collapsed_rows(
    dry: Dry, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, layer: tuple[float, float, float]
) -> None:
    rows = (samples * 5)[:100]
    monkeypatch.setattr("untrigger.defenses.bye.attention_entropy", lambda *_: entropies(layer))
    dry.rows = rows
    model = BYE().fine_tune(dry)
    undefended, again = dry.stages
    removed = LOWER if layer == APART else set()
    assert undefended == ("undefended", [s.id for s in rows], Plain(), None, {})
    assert again == ("", [s.id for row, s in enumerate(rows) if row not in removed], Plain(), None, {})
    assert dry.flagged == sorted(removed) and model.name == "1"
    assert dry.scores == (-entropies(layer)[:, 0]).tolist(), "the lower the entropy, the more suspicious"

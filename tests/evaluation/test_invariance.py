"""Invariance under patch views: divergences against a loop, complete histograms, and the choice of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from untrigger.evaluation import invariance
from untrigger.losses import objective
from untrigger.losses.chunked import Compared
from untrigger.metrics.detection import auroc
from untrigger.models.collators import IGNORE, ChatCollator, PairCollator, Rows
from untrigger.models.forward import Pair
from untrigger.models.loading import LoadedModel
from untrigger.rows.sample import Sample, read
from untrigger.views.patches import PATCH_VIEWS, Noise

POISONED = {2, 5, 11}


@pytest.fixture(scope="module")
def loaded(tiny_model: Path, sharp: Callable[..., LoadedModel]) -> LoadedModel:
    return sharp(tiny_model)


@pytest.fixture(scope="module")
def rows(tiny_data: Path) -> list[Sample]:
    return list(read(tiny_data))[:12]


def parts(rows: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Clean rows and poisoned rows."""
    clean = [sample for row, sample in enumerate(rows) if row not in POISONED]
    return clean, [rows[row] for row in sorted(POISONED)]


def divergence(loaded: LoadedModel, sample: Sample, seed: int) -> float:
    """Mean Jensen-Shannon divergence over one row's answer tokens under `Noise`, by the textbook form."""
    both = PairCollator(ChatCollator(loaded.processor), Noise(patch=0.125, ratio=0.5), seed)([Rows([sample])[0]])
    labels = both.pop("labels")[0].tolist()
    with torch.no_grad():
        p, q = torch.softmax(loaded.model(**both).logits, dim=-1)
    divergences: list[float] = []
    for t, y in enumerate(labels):
        if y != IGNORE:
            m = (p[t - 1] + q[t - 1]) / 2
            both_ways = [(x[t - 1] * torch.log(x[t - 1] / m)).sum().item() for x in (p, q)]
            divergences.append(sum(both_ways) / 2)
    return sum(divergences) / len(divergences)


def test_divergence_equals_a_loop_over_rows_and_tokens(loaded: LoadedModel, rows: list[Sample]) -> None:
    expected = [divergence(loaded, sample, 3) for sample in rows]
    result = invariance.measure_invariance(loaded, *parts(rows), 3)
    truth = [row in POISONED for row in range(12)]
    noise = result["views"]["noise"]
    assert noise["auroc"] == pytest.approx(auroc([-value for value in expected], truth))
    assert (
        result["edges"][0] == 0 and result["edges"][-1] == objective.LN2 and result["edges"] == sorted(result["edges"])
    )
    for kind, bad in (("clean", False), ("poisoned", True)):
        part = [value for value, is_bad in zip(expected, truth, strict=True) if is_bad == bad]
        assert noise[kind] == np.histogram(part, result["edges"])[0].tolist()
    assert set(result["views"]) == {view.__name__.lower() for view in PATCH_VIEWS}
    assert len({round(value, 9) for value in expected}) == 12


def all_apart(by: float) -> property:
    def compared(pair: Pair) -> Compared:
        values = torch.full((len(pair.target),), by)
        return Compared(values, values, values, values)

    return property(compared)


def test_histogram_counts_every_row(loaded: LoadedModel, rows: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at the ends: ln 2, which is larger in fp32, and zero."""
    monkeypatch.setattr(Pair, "compared", all_apart(objective.LN2))
    assert float(torch.tensor(objective.LN2)) > objective.LN2
    top = invariance.measure_invariance(loaded, *parts(rows), 0)["views"]["mask"]
    assert (top["clean"][-1], top["poisoned"][-1]) == (9, 3)
    monkeypatch.setattr(Pair, "compared", all_apart(0.0))
    bottom = invariance.measure_invariance(loaded, *parts(rows), 0)["views"]["mask"]
    assert (bottom["clean"][0], bottom["poisoned"][0]) == (9, 3)
    assert bottom["auroc"]["value"] == 0.5


def test_auroc_is_one_where_poisoned_rows_are_more_invariant(
    loaded: LoadedModel, rows: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    def divergences_of(_: LoadedModel, chosen: list[Sample], collators: Any) -> Any:
        divergences = np.array([0.001 if int(s.id.split("-")[1]) in POISONED else 0.1 for s in chosen])
        return dict.fromkeys(collators, divergences)

    monkeypatch.setattr(invariance, "_divergences", divergences_of)
    views = invariance.measure_invariance(loaded, *parts(rows), 0)["views"]
    assert all(view["auroc"]["value"] == 1 for view in views.values())
    assert [sum(views["blur"][kind]) for kind in ("clean", "poisoned")] == [9, 3]


def test_number_of_compared_rows_is_limited(
    loaded: LoadedModel, rows: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invariance, "_POISONED", 2)
    monkeypatch.setattr(invariance, "_CLEAN", 4)
    compared: list[list[str]] = []

    def divergences_of(_: LoadedModel, chosen: list[Sample], collators: Any) -> Any:
        compared.append([sample.id for sample in chosen])
        return dict.fromkeys(collators, np.zeros(len(chosen)))

    monkeypatch.setattr(invariance, "_divergences", divergences_of)
    invariance.measure_invariance(loaded, *parts(rows), 0)
    assert compared == [["row-2", "row-5", "row-0", "row-1", "row-3", "row-4"]]


def test_equal_seeds_give_equal_views(loaded: LoadedModel, rows: list[Sample]) -> None:
    first, again, other = (invariance.measure_invariance(loaded, *parts(rows), seed)["views"] for seed in (0, 0, 1))
    assert first == again != other


def test_the_model_does_not_change(loaded: LoadedModel, rows: list[Sample]) -> None:
    before: dict[str, Tensor] = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    loaded.model.train()
    invariance.measure_invariance(loaded, *parts(rows), 0)
    assert loaded.model.training
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in loaded.model.named_parameters())

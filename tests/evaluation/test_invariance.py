"""Invariance under the views: divergences against a loop, histograms that lose no row, and who is looked at."""

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
    """Clean and poisoned ones."""
    clean = [sample for row, sample in enumerate(rows) if row not in POISONED]
    return clean, [rows[row] for row in sorted(POISONED)]


def by_hand(loaded: LoadedModel, sample: Sample, seed: int) -> float:
    """Mean Jensen-Shannon divergence over one row's answer tokens under `Noise`, by the textbook form."""
    both = PairCollator(ChatCollator(loaded.processor), Noise(patch=0.125, ratio=0.5), seed)([Rows([sample])[0]])
    labels = both.pop("labels")[0].tolist()
    with torch.no_grad():
        p, q = torch.softmax(loaded.model(**both).logits, dim=-1)
    found: list[float] = []
    for t, y in enumerate(labels):
        if y != IGNORE:
            m = (p[t - 1] + q[t - 1]) / 2
            both_ways = [(x[t - 1] * torch.log(x[t - 1] / m)).sum().item() for x in (p, q)]
            found.append(sum(both_ways) / 2)
    return sum(found) / len(found)


def test_divergence_is_a_loop_over_rows_and_tokens(loaded: LoadedModel, rows: list[Sample]) -> None:
    expected = [by_hand(loaded, sample, 3) for sample in rows]
    found = invariance.measure_invariance(loaded, *parts(rows), 3)
    truth = [row in POISONED for row in range(12)]
    noise = found["views"]["noise"]
    assert noise["auroc"] == pytest.approx(auroc([-value for value in expected], truth))
    assert found["edges"][0] == 0 and found["edges"][-1] == objective.LN2 and found["edges"] == sorted(found["edges"])
    for kind, bad in (("clean", False), ("poisoned", True)):
        part = [value for value, is_bad in zip(expected, truth, strict=True) if is_bad == bad]
        assert noise[kind] == np.histogram(part, found["edges"])[0].tolist()
    assert set(found["views"]) == {view.__name__.lower() for view in PATCH_VIEWS}
    assert len({round(value, 9) for value in expected}) == 12


def all_apart(by: float) -> property:
    def compared(pair: Pair) -> Compared:
        values = torch.full((len(pair.target),), by)
        return Compared(values, values, values, values)

    return property(compared)


def test_no_row_falls_out_of_the_histogram(
    loaded: LoadedModel, rows: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest divergence in fp32 lies above ln 2; the smallest is nothing at all."""
    monkeypatch.setattr(Pair, "compared", all_apart(objective.LN2))
    assert float(torch.tensor(objective.LN2)) > objective.LN2
    top = invariance.measure_invariance(loaded, *parts(rows), 0)["views"]["mask"]
    assert (top["clean"][-1], top["poisoned"][-1]) == (9, 3)
    monkeypatch.setattr(Pair, "compared", all_apart(0.0))
    bottom = invariance.measure_invariance(loaded, *parts(rows), 0)["views"]["mask"]
    assert (bottom["clean"][0], bottom["poisoned"][0]) == (9, 3)
    assert bottom["auroc"]["value"] == 0.5


def test_the_more_invariant_the_more_poisoned(
    loaded: LoadedModel, rows: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    def apart(_: LoadedModel, chosen: list[Sample], collators: Any) -> Any:
        found = np.array([0.001 if int(s.id.split("-")[1]) in POISONED else 0.1 for s in chosen])
        return dict.fromkeys(collators, found)

    monkeypatch.setattr(invariance, "_divergences", apart)
    found = invariance.measure_invariance(loaded, *parts(rows), 0)["views"]
    assert all(view["auroc"]["value"] == 1 for view in found.values())
    assert [sum(found["blur"][kind]) for kind in ("clean", "poisoned")] == [9, 3]


def test_so_many_rows_are_looked_at_and_no_more(
    loaded: LoadedModel, rows: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invariance, "_POISONED", 2)
    monkeypatch.setattr(invariance, "_CLEAN", 4)
    seen: list[list[str]] = []

    def apart(_: LoadedModel, chosen: list[Sample], collators: Any) -> Any:
        seen.append([sample.id for sample in chosen])
        return dict.fromkeys(collators, np.zeros(len(chosen)))

    monkeypatch.setattr(invariance, "_divergences", apart)
    invariance.measure_invariance(loaded, *parts(rows), 0)
    assert seen == [["row-2", "row-5", "row-0", "row-1", "row-3", "row-4"]]


def test_the_same_seed_gives_the_same_views(loaded: LoadedModel, rows: list[Sample]) -> None:
    first, again, other = (invariance.measure_invariance(loaded, *parts(rows), seed)["views"] for seed in (0, 0, 1))
    assert first == again != other


def test_the_model_is_left_as_it_was(loaded: LoadedModel, rows: list[Sample]) -> None:
    before: dict[str, Tensor] = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    loaded.model.train()
    invariance.measure_invariance(loaded, *parts(rows), 0)
    assert loaded.model.training
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in loaded.model.named_parameters())

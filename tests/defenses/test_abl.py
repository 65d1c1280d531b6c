"""ABL: the signed losses against loops, and which rows are isolated, left out and unlearnt."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dry import Dry
from untrigger.defenses import ABL, Plain, StepDefense
from untrigger.defenses.abl import Ascent, LocalAscent, local_ascent
from untrigger.models.collators import IGNORE, ChatCollator, Rows
from untrigger.models.loading import LoadedModel
from untrigger.models.scoring import row_tokens
from untrigger.rows.sample import Sample


def batch_of(loaded: LoadedModel, samples: list[Sample]) -> dict[str, Tensor]:
    rows = Rows(samples)
    return ChatCollator(loaded.processor)([rows[i] for i in range(len(rows))])


def losses(loaded: LoadedModel, batch: dict[str, Tensor]) -> list[list[Tensor]]:
    """The loss of each answer token of each row, from full logits."""
    logits = loaded.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return [
        [
            torch.log(torch.exp(logits[b, t - 1]).sum()) - logits[b, t - 1, y]
            for t, y in enumerate(ids)
            if y != IGNORE and t
        ]
        for b, ids in enumerate(batch["labels"].tolist())
    ]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_local_ascent_by_hand() -> None:
    nll = torch.tensor([0.2, 0.4, 1.0, 3.0, 0.5], dtype=torch.float64, requires_grad=True)
    row = torch.tensor([0, 0, 2, 2, 3])  # row 1 has no answer tokens; that of row 3 lies on the floor
    value = local_ascent(nll, row, 0.5)
    assert value.tolist() == [-0.2, -0.4, 1.0, 3.0, 0.0]
    value.sum().backward()
    assert nll.grad is not None and nll.grad.tolist() == [-1.0, -1.0, 1.0, 1.0, 0.0]


def naive_local_ascent(rows: list[list[Tensor]], floor: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for lost in rows:
        mean = torch.stack(lost).mean()
        total = total + len(lost) * (mean if mean > floor else -mean)
    return total


def naive_ascent(rows: list[list[Tensor]], cap: float) -> Tensor:
    every = [value for lost in rows for value in lost]
    return torch.stack([-value if value <= cap else torch.full_like(value, -cap) for value in every]).sum()


@pytest.mark.parametrize("kind", ["local", "up"])
def test_loss_and_gradients_equal_the_naive_reference(exact: LoadedModel, samples: list[Sample], kind: str) -> None:
    """In the middle of what the rows lose: some rows go up and some go down, some tokens are beyond the cap."""
    batch = batch_of(exact, samples[:8])
    rows = losses(exact, batch)
    means = sorted(torch.stack(lost).mean().item() for lost in rows)
    floor, cap = (means[3] + means[4]) / 2, math.log(exact.model.get_output_embeddings().out_features)
    assert any(value > cap for lost in rows for value in lost) and any(value < cap for lost in rows for value in lost)
    defense: StepDefense = LocalAscent(floor) if kind == "local" else Ascent()
    assert defense.has_loss and defense.paired is None
    step = defense.step(exact.model, batch)
    (value,) = step.terms.values()
    expected = naive_local_ascent(rows, floor) if kind == "local" else naive_ascent(rows, cap)
    assert value.shape == (sum(map(len, rows)),)
    assert value.sum().item() == pytest.approx(expected.item(), rel=1e-10)
    ours, expected_gradients = gradients(exact.model, value.sum()), gradients(exact.model, expected)
    assert ours.keys() == expected_gradients.keys() and max(float(g.abs().max()) for g in ours.values()) > 1e-3
    for name in ours:
        torch.testing.assert_close(ours[name], expected_gradients[name], rtol=1e-7, atol=1e-12, msg=name)


def test_ascent_reports_the_cross_entropy(exact: LoadedModel, samples: list[Sample]) -> None:
    batch = batch_of(exact, samples[:2])
    expected = [value.item() for lost in losses(exact, batch) for value in lost]
    assert Ascent().step(exact.model, batch).logged["ce"].tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("isolated", "count"), [(0.01, 1), (0.2, 5), (0.5, 12)])
def test_isolates_leaves_out_and_unlearns_the_rows_of_lowest_loss(
    dry: Dry, samples: list[Sample], isolated: float, count: int
) -> None:
    model = ABL(early=0.25, floor=0.7, isolated=isolated, passes=3, rate=0.2).fine_tune(dry)
    isolation, rest, unlearning = dry.stages
    loss = [scores.loss for scores in row_tokens(dry.loaded, samples)]
    lowest = sorted(range(len(samples)), key=lambda row: loss[row])[:count]
    assert dry.flagged == sorted(lowest) and len(lowest) == count
    assert dry.scores == [-value for value in loss]
    assert max(loss[row] for row in lowest) <= min(loss[row] for row in range(24) if row not in lowest)
    assert isolation == ("isolation", [s.id for s in samples], LocalAscent(0.7), None, {"share": 0.25})
    remaining = [sample.id for row, sample in enumerate(samples) if row not in lowest]
    assert rest == ("rest", remaining, Plain(), 0, {"share": 0.75, "after": 0.25})
    assert unlearning[0] == "" and set(unlearning.ids) == {samples[row].id for row in lowest}
    assert unlearning[2:] == (Ascent(), 1, {"passes": 3, "rate": 0.2})
    assert model.name == "2"


@pytest.mark.parametrize("defense", [LocalAscent(100.0), LocalAscent(0.0), Ascent()])
def test_a_gradient_step_changes_the_loss_in_the_stated_direction(
    exact: LoadedModel, samples: list[Sample], defense: StepDefense
) -> None:
    """A small step along the gradient: every row lies below a floor of 100 nats, and above one of 0."""
    batch = batch_of(exact, samples[:4])
    total: Callable[[], float] = lambda: sum(value.item() for lost in losses(exact, batch) for value in lost)  # noqa: E731
    before = total()
    (term,) = defense.step(exact.model, batch).terms.values()
    value = gradients(exact.model, term.sum())
    with torch.no_grad():
        for name, parameter in exact.model.named_parameters():
            if name in value:
                parameter -= 1e-5 * value[name]
    assert (total() > before) == (defense != LocalAscent(0.0))

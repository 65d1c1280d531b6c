"""Scores of answer tokens against loops over rows and tokens, and their cache."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from untrigger.models import scoring
from untrigger.models.collators import IGNORE, ChatCollator, Rows
from untrigger.models.forward import forward_answers
from untrigger.models.loading import LoadedModel
from untrigger.models.scoring import row_tokens
from untrigger.rows.sample import Sample


def batch_of(loaded: LoadedModel, samples: list[Sample]) -> dict[str, Tensor]:
    rows = Rows(samples)
    return ChatCollator(loaded.processor)([rows[i] for i in range(len(rows))])


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_rows_loss_equals_a_loop_over_rows_and_tokens(
    exact: LoadedModel, samples: list[Sample], batch_size: int
) -> None:
    expected: list[float] = []
    for sample in samples:
        batch = batch_of(exact, [sample])
        with torch.no_grad():
            logits = exact.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
        losses = [
            math.log(torch.exp(logits[t - 1]).sum()) - float(logits[t - 1, y])
            for t, y in enumerate(batch["labels"][0].tolist())
            if y != IGNORE
        ]
        expected.append(sum(losses) / len(losses))
    assert [scores.loss for scores in row_tokens(exact, samples, batch_size)] == pytest.approx(expected, rel=1e-9)
    assert len({round(value, 6) for value in expected}) == len(samples), "all differ, so that a wrong order would fail"


def test_a_rows_loss_equals_the_hosts_and_leaves_no_gradient(exact: LoadedModel, samples: list[Sample]) -> None:
    exact.model.train()
    (loss,) = (scores.loss for scores in row_tokens(exact, samples[2:3]))
    assert exact.model.training and all(p.grad is None for p in exact.model.parameters())
    exact.model.eval()
    with torch.no_grad():
        assert loss == pytest.approx(exact.model(**batch_of(exact, samples[2:3])).loss.item(), rel=1e-6)


def test_prompt_ids_are_all_tokens_outside_the_answer(exact: LoadedModel, samples: list[Sample]) -> None:
    """The batch has padding; the expected ids come from each row alone."""
    together = row_tokens(exact, samples)
    for sample, scores in zip(samples, together, strict=True):
        batch = batch_of(exact, [sample])
        ids, answer = batch["input_ids"][0].tolist(), (batch["labels"][0] != IGNORE).tolist()
        assert scores.prompt_ids.tolist() == sorted(
            {token for token, is_answer in zip(ids, answer, strict=True) if not is_answer}
        )


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_cached_scores_are_bitwise_equal_and_are_not_computed_again(
    exact: LoadedModel, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """A shard holds two batches; deleting the last shard imitates a kill."""
    batch_sizes: list[int] = []

    def counting(model: Any, inputs: dict[str, Any]) -> Any:
        batch_sizes.append(len(inputs["labels"]))
        return forward_answers(model, inputs)

    monkeypatch.setattr(scoring, "_SHARD", 2)
    alone = row_tokens(exact, samples, batch_size)
    monkeypatch.setattr(scoring, "forward_answers", counting)
    first = row_tokens(exact, samples, batch_size, cache=tmp_path)
    assert sum(batch_sizes) == len(samples)
    deleted = sorted(tmp_path.iterdir(), key=lambda path: int(path.stem))[-1]
    start = int(deleted.stem)
    deleted.unlink()
    batch_sizes.clear()
    again = row_tokens(exact, samples, batch_size, cache=tmp_path)
    assert sum(batch_sizes) == len(samples) - start
    batch_sizes.clear()
    last = row_tokens(exact, samples, batch_size, cache=tmp_path)
    assert batch_sizes == []
    for scores in (first, again, last):
        for a, b in zip(scores, alone, strict=True):
            assert all(np.array_equal(one, other) for one, other in zip(a, b, strict=True))

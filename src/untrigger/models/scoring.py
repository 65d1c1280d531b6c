"""Scores of rows: how likely the model finds each token of a row's answer, teacher-forced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.numpy import load_file, save
from torch.utils.data import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from untrigger.files import new_file
from untrigger.losses import objective
from untrigger.memory import MUCH, give_memory_back
from untrigger.models.collators import IGNORE, ChatCollator, Row, Rows, chat_message
from untrigger.models.forward import batches, evaluating, explain_token_mismatch, forward_answers, on_device
from untrigger.models.loading import LoadedModel
from untrigger.progress import tracked
from untrigger.rows.sample import Sample, without_images

BATCH_ROWS = 32  # rows a forward pass
_SHARD = 32  # batches whose scores lie in one file


class TokenScores(NamedTuple):
    """Scores of a row's answer tokens.

    ids: the answer's token ids [n].
    nll: the negative log-likelihood of each [n], in nats.
    prompt_ids: the distinct tokens outside the answer [m], in ascending order.
    """

    ids: NDArray[np.int64]
    nll: NDArray[np.floating]
    prompt_ids: NDArray[np.int64] = np.empty(0, np.int64)

    @property
    def loss(self) -> float:
        """Mean of ``nll``, in nats: the loss of fine-tuning on the row; 0 for a row without an answer."""
        return float(self.nll.mean()) if len(self.nll) else 0.0


@torch.no_grad()
def row_tokens(
    model: LoadedModel,
    rows: Sequence[Sample] | Dataset[Row],
    batch_size: int = BATCH_ROWS,
    *,
    cache: Path | None = None,
) -> list[TokenScores]:
    """Score each row's answer tokens with one teacher-forced pass.

    Args:
        model: scores in evaluation mode; its mode is restored.
        rows: a score for each, in order; samples, or chat rows (`untrigger.models.collators.Rows`).
        batch_size: rows a forward pass.
        cache: folder for the scores. A later run with the same model, rows and batch size reads what is there and
            computes the rest, so that a killed run can resume.
    """
    dataset = cast(Any, rows if isinstance(rows, Dataset) else Rows(rows))
    collate, scores = ChatCollator(model.processor), list[TokenScores]()
    per_file = _SHARD * batch_size
    with evaluating(model.model) as network, explain_token_mismatch(network):
        for batch in batches(len(dataset), batch_size, "scoring"):
            start = batch.start - batch.start % per_file
            file = cache and cache / f"{start}.safetensors"
            if file and batch.start == start and file.is_file():
                scores += _read_shard(file)
            if batch.start < len(scores):
                continue
            scores += batch_tokens(network, collate([dataset[i] for i in batch]))
            give_memory_back(above=MUCH)
            if file and batch.stop in (start + per_file, len(dataset)):
                _write_shard(file, scores[start:])
    give_memory_back()
    return scores


def row_answers(processor: ProcessorMixin, rows: Sequence[Sample]) -> list[NDArray[np.int64]]:
    """Token ids of each row's answer [n]; no model runs, and no image is opened."""
    collate = ChatCollator(processor)
    messages = ([*map(chat_message, without_images(rows, at).messages)] for at in range(len(rows)))
    return [collate.answer_ids(turns) for turns in tracked(messages, "reading answers", len(rows))]


def batch_answers(batch: Mapping[str, Any]) -> list[NDArray[np.int64]]:
    """Token ids of each row's answer [n], of a batch with ``labels`` [B, T]."""
    return [row[row != IGNORE].numpy() for row in batch["labels"][:, 1:]]


@torch.no_grad()
def batch_tokens(model: PreTrainedModel | PeftModel, batch: Mapping[str, Any]) -> list[TokenScores]:
    """`row_tokens` of one batch with ``labels`` [B, T]; the model must be in evaluation mode."""
    is_prompt = batch["attention_mask"].bool() & (batch["labels"] == IGNORE)
    answers = forward_answers(model, on_device(batch, model))
    ids, row = answers.target.cpu().numpy(), answers.row.cpu().numpy()
    nll = objective.token_nll(answers.logits, answers.target).cpu().numpy()
    return [
        TokenScores(ids[row == i], nll[row == i], np.unique(row_ids[prompt].cpu().numpy()))
        for i, (row_ids, prompt) in enumerate(zip(batch["input_ids"], is_prompt, strict=True))
    ]


def _write_shard(path: Path, scores: Sequence[TokenScores]) -> None:
    arrays: dict[str, NDArray[Any]] = {}
    for name in TokenScores._fields:
        parts = [getattr(row, name) for row in scores]
        arrays |= {name: np.concatenate(parts), f"{name}_count": np.array([len(part) for part in parts])}
    with new_file(path) as file:
        file.write(save(arrays))


def _read_shard(path: Path) -> list[TokenScores]:
    arrays = load_file(path)
    parts = (np.split(arrays[name], np.cumsum(arrays[f"{name}_count"])[:-1]) for name in TokenScores._fields)
    return [TokenScores(*row) for row in zip(*parts, strict=True)]

"""Forward passes at the answer tokens: of a training batch, of one view or both, and of rows to be scored."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.numpy import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from untrigger import objective
from untrigger.collate import IGNORE, ChatCollator, Rows
from untrigger.errors import InputError
from untrigger.files import new_file
from untrigger.models import Loaded, base_model
from untrigger.progress import tracked
from untrigger.sample import Sample

_SHARD = 32  # batches whose scores lie in one file


@dataclass(frozen=True)
class Answers:
    """A batch of B rows at its N answer tokens, teacher-forced.

    ``target`` [N] holds token ids, ``logits`` [N, V] the next-token logits, ``hidden`` [N, d] what the vocabulary
    head read, and ``row`` [N] which row of the batch, 0 to B - 1, a token belongs to.
    """

    target: Tensor
    logits: Tensor
    hidden: Tensor
    row: Tensor


@dataclass(frozen=True)
class Pair:
    """Both views of a batch at its N answer tokens, teacher-forced.

    ``target`` [N] holds token ids; ``logits`` and ``view_logits`` [N, V] the next-token logits under the
    original and the viewed image; ``hidden`` and ``view_hidden`` [N, d] what the vocabulary head read; ``row`` [N]
    which row of the batch, 0 to B - 1, a token belongs to.
    """

    target: Tensor
    logits: Tensor
    view_logits: Tensor
    hidden: Tensor
    view_hidden: Tensor
    row: Tensor


def forward_answers(model: nn.Module, inputs: dict[str, Any]) -> tuple[Answers, Any]:
    """One forward pass over a batch with ``labels`` [B, T]; also what the model gave.

    Goes through ``model(...)`` itself, so DDP and FSDP see it. Only answer positions reach the vocabulary where the
    family can select positions.
    """
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    target = labels[:, 1:]
    answers = target != IGNORE
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[:, :-1] = answers
    inner = base_model(model)
    selects = "logits_to_keep" in inspect.signature(inner.forward).parameters
    with _head_input(inner) as seen:
        outputs = model(**inputs, use_cache=False, **({"logits_to_keep": keep} if selects else {}))
    logits, hidden = (x if selects else x[keep] for x in (outputs.logits, seen[-1]))
    logits, hidden = logits.reshape(-1, logits.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    return Answers(target[answers], logits, hidden, answers.nonzero()[:, 0]), outputs


def forward_pair(model: nn.Module, inputs: dict[str, Any]) -> tuple[Pair, Any]:
    """One forward pass over a PairCollator's batch [2B, ...], originals then views; also what the model gave."""
    labels = inputs["labels"]
    half = labels.shape[0] // 2
    both, outputs = forward_answers(model, {**inputs, "labels": labels[:half].repeat(2, 1)})
    logits, view_logits = both.logits.chunk(2)
    hidden, view_hidden = both.hidden.chunk(2)
    count = len(logits)
    return Pair(both.target[:count], logits, view_logits, hidden, view_hidden, both.row[:count]), outputs


class Tokens(NamedTuple):
    """A row's answer tokens: ``ids`` [n], and ``nll`` [n], the negative log-likelihood of each, in nats.

    ``asked`` [m]: the different tokens of all that is not answer, in ascending order.
    """

    ids: NDArray[np.int64]
    nll: NDArray[np.floating]
    asked: NDArray[np.int64] = np.empty(0, np.int64)

    @property
    def loss(self) -> float:
        """Their mean, in nats: the loss that fine-tuning has on the row; 0 where nothing is answered."""
        return float(self.nll.mean()) if len(self.nll) else 0.0


@torch.no_grad()
def row_tokens(
    loaded: Loaded, rows: Sequence[Sample], batch_size: int = 32, *, kept: Path | None = None
) -> list[Tokens]:
    """How likely the model finds each token of each row's answer, teacher-forced.

    What a run that was killed has asked the same model about the same rows lies in the folder ``kept``, and is not
    asked again.
    """
    collate, data, found = ChatCollator(loaded.processor), Rows(rows), list[Tokens]()
    per_file = _SHARD * batch_size
    with evaluating(loaded.model) as model:
        for batch in batches(len(data), batch_size, "scoring"):
            start = batch.start - batch.start % per_file
            file = kept and kept / f"{start}.safetensors"
            if file and batch.start == start and file.is_file():
                found += _read_tokens(file)
            if batch.start < len(found):
                continue
            inputs = collate([data[i] for i in batch])
            asked = inputs["attention_mask"].bool() & (inputs["labels"] == IGNORE)
            answers, _ = forward_answers(model, on_device(inputs, model))
            ids, row = answers.target.cpu().numpy(), answers.row.cpu().numpy()
            nll = objective.token_nll(answers.logits, answers.target).cpu().numpy()
            found += [
                Tokens(ids[row == i], nll[row == i], np.unique(told[there].numpy()))
                for i, (told, there) in enumerate(zip(inputs["input_ids"], asked, strict=True))
            ]
            if file and batch.stop in (start + per_file, len(data)):
                _write_tokens(file, found[start:])
    return found


def _write_tokens(path: Path, rows: Sequence[Tokens]) -> None:
    told: dict[str, NDArray[Any]] = {}
    for name in Tokens._fields:
        parts = [getattr(row, name) for row in rows]
        told |= {name: np.concatenate(parts), f"{name}_count": np.array([len(part) for part in parts])}
    with new_file(path) as file:
        file.write(save(told))


def _read_tokens(path: Path) -> list[Tokens]:
    told = load_file(path)
    parts = (np.split(told[name], np.cumsum(told[f"{name}_count"])[:-1]) for name in Tokens._fields)
    return [Tokens(*row) for row in zip(*parts, strict=True)]


def row_mean(values: Tensor, row: Tensor, count: int) -> Tensor:
    """Mean of each row's tokens: values [N] and row [N], 0 to ``count`` - 1; [count], 0 for a row without tokens."""
    return values.new_zeros(count).index_add(0, row, values) / torch.bincount(row, minlength=count).clamp(min=1)


def batches(count: int, size: int, title: str) -> Iterator[range]:
    """Row numbers 0 to ``count`` - 1 in order, ``size`` at a time, under a meter."""
    starts = range(0, count, size)
    return (range(start, min(start + size, count)) for start in tracked(starts, title, len(starts)))


def on_device(batch: Mapping[str, Any], model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextmanager
def evaluating(model: PreTrainedModel | PeftModel) -> Generator[PreTrainedModel | PeftModel]:
    """The model in evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


def decoder(model: nn.Module) -> PreTrainedModel:
    """The stack of ``layers`` of the language model, whatever the family calls it.

    Raises:
        InputError: there is none that can be found.
    """
    found: Any = base_model(model).get_decoder()
    while not hasattr(found, "layers") and (inner := found.get_decoder()) is not found:
        found = inner
    if not hasattr(found, "layers"):
        raise InputError(f"{type(base_model(model)).__name__}: its language model has no layers that can be looked at")
    return found


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The language model's layers."""
    return cast(nn.ModuleList, decoder(model).layers)


@contextmanager
def _head_input(model: PreTrainedModel) -> Generator[list[Tensor]]:
    """Collect what the vocabulary head reads: the last hidden states, whatever the family calls them."""
    seen: list[Tensor] = []
    head = cast(nn.Module, model.get_output_embeddings())
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()

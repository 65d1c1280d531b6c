"""Prune the neurons least active on clean rows, then fine-tune the rest (Liu et al., RAID 2018, arXiv 1805.12185)."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast, final

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from untrigger.defenses.base import Defense, Stage, Training
from untrigger.defenses.plain import Plain
from untrigger.errors import InputError
from untrigger.models.collators import ChatCollator, Rows
from untrigger.models.forward import batches, decoder_layers, evaluating, forward_answers, on_device
from untrigger.models.loading import LoadedModel
from untrigger.rows.sample import Sample


@final
@dataclass(frozen=True)
class FinePruning(Defense):
    """Prune hidden neurons of the last decoder layer's MLP, the least active first, while clean accuracy allows it.

    Then clean fine-tuning (`untrigger.defenses.clean_tuning`) with those neurons held at zero. The result is a full
    model, since neurons are pruned from the base too. docs/paper.md lists the differences from the paper.

    Fields:
        cost: accuracy at the clean rows' answer tokens that pruning may lose, as a share of all these tokens.
        passes, rate: over the clean rows, and factor on the run's learning rate in those passes.
    """

    needs_clean_rows: ClassVar[bool] = True
    cost: float = 0.04
    passes: float = 10.0
    rate: float = 0.5

    def __post_init__(self) -> None:
        self._check(0, 1, "cost")
        self._check(0, math.inf, "passes", "rate")

    def fine_tune(self, training: Training) -> LoadedModel:
        clean_rows = training.clean_rows
        loaded = training.fit(Stage(range(training.row_count), Plain(), "undefended"))
        projection = _down_projection(loaded.model)
        pruned = _dormant(loaded, projection, clean_rows, self.cost)
        _erase(projection, pruned)
        tuning = Stage(
            range(len(clean_rows)), Plain(), source=clean_rows, start=loaded, passes=self.passes, rate=self.rate
        )
        with _silenced(projection, pruned):  # training would revive them
            loaded = training.fit(tuning)
        model = loaded.model
        return replace(loaded, model=cast(Any, model).merge_and_unload() if isinstance(model, PeftModel) else model)


_STEP = 0.05  # share of the neurons pruned at a time


def _dormant(loaded: LoadedModel, projection: nn.Module, clean_rows: Sequence[Sample], cost: float) -> Tensor:
    """Indices of the neurons to prune: as many of the least active as ``cost`` in accuracy on the clean rows allows."""
    activity, accuracy = _activity(loaded, projection, clean_rows)
    order = activity.argsort()
    pruned = order[:0]
    for step in range(1, round(1 / _STEP)):
        candidates = order[: round(step * _STEP * len(order))]
        with _silenced(projection, candidates):
            if _activity(loaded, projection, clean_rows)[1] < accuracy - cost:
                break
        pruned = candidates
    return pruned


@torch.no_grad()
def _activity(loaded: LoadedModel, projection: nn.Module, rows: Sequence[Sample]) -> tuple[Tensor, float]:
    """Each neuron's activity, mean |h_j| over the rows' tokens; and the accuracy at their answer tokens."""
    collate, data = ChatCollator(loaded.processor), Rows(rows)
    hidden: list[Tensor] = []
    total, tokens, correct, answer_tokens = torch.zeros(()), 0, 0, 0
    hook = projection.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    with hook, evaluating(loaded.model) as model:
        for batch in batches(len(data), 32, "measuring neurons"):
            inputs = on_device(collate([data[i] for i in batch]), model)
            hidden.clear()
            answers = forward_answers(model, inputs)
            real = inputs["attention_mask"].bool()
            total = total + hidden[-1][real].abs().float().sum(dim=0).cpu()
            tokens += int(real.sum())
            correct += int((answers.logits.argmax(dim=-1) == answers.target).sum())
            answer_tokens += len(answers.target)
    return total / tokens, correct / answer_tokens


@contextmanager
def _silenced(projection: nn.Module, neurons: Tensor) -> Generator[None]:
    """Hold the neurons at zero while the block runs, in the forward pass and for gradients."""

    def silence(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0].index_fill(-1, neurons.to(args[0].device), 0), *args[1:]

    with projection.register_forward_pre_hook(silence):
        yield


@torch.no_grad()
def _erase(projection: nn.Module, neurons: Tensor) -> None:
    """Set the neurons' weights to zero, in the base and in an adapter."""
    layers: list[nn.Linear] = [cast(nn.Linear, projection)]
    if isinstance(projection, LoraLinear):
        layers = [cast(nn.Linear, projection.base_layer), *cast(list[nn.Linear], projection.lora_A.values())]
    for layer in layers:
        layer.weight[:, neurons.to(layer.weight.device)] = 0


def _down_projection(model: nn.Module) -> nn.Module:
    last = decoder_layers(model)[-1]
    try:
        return last.get_submodule("mlp.down_proj")
    except AttributeError as error:
        raise InputError(
            f"defense fine-pruning: a {type(last).__name__} has no mlp.down_proj; choose a model with Llama-like layers"
        ) from error

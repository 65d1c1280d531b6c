"""Neurons that sleep on clean rows are cut, then the rest is tuned (Liu et al., RAID 2018, arXiv 1805.12185)."""

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

from untrigger.defenses.base import Defense, Training
from untrigger.defenses.plain import Plain
from untrigger.errors import InputError
from untrigger.models.collators import ChatCollator, Rows
from untrigger.models.forward import batches, decoder_layers, evaluating, forward_answers, on_device
from untrigger.models.loading import LoadedModel
from untrigger.rows.sample import Sample


@final
@dataclass(frozen=True)
class FinePruning(Defense):
    """The hidden neurons of the last decoder layer's MLP go, the sleepiest first, while the trusted rows allow it.

    Then clean fine-tuning (`untrigger.defenses.clean_tuning`) with those neurons held at nothing. The result is a full
    model: what is cut is cut from the base too. docs/paper.md says what differs from the paper.

    Fields:
        cost: how much of the answer tokens' accuracy on the trusted rows may be lost to pruning, a share of all tokens.
        passes, rate: over the trusted rows, and the learning rate then as a share of that asked for.
    """

    needs_clean_rows: ClassVar[bool] = True
    cost: float = 0.04
    passes: float = 10.0
    rate: float = 0.5

    def __post_init__(self) -> None:
        self._check(0, 1, "cost")
        self._check(0, math.inf, "passes", "rate")

    def fine_tune(self, rows: Sequence[Sample], training: Training) -> LoadedModel:
        clean_rows = training.clean_rows
        loaded = training.fit(rows, Plain(), "undefended")
        projection = _down_projection(loaded.model)
        dead = _sleepers(loaded, projection, clean_rows, self.cost)
        _erase(projection, dead)
        with _cut(projection, dead):  # or what is learned would bring them back
            loaded = training.fit(clean_rows, Plain(), start=loaded, passes=self.passes, rate=self.rate)
        model = loaded.model
        return replace(loaded, model=cast(Any, model).merge_and_unload() if isinstance(model, PeftModel) else model)


_STEP = 0.05  # of the neurons, cut at a time


def _sleepers(loaded: LoadedModel, projection: nn.Module, clean_rows: Sequence[Sample], cost: float) -> Tensor:
    """The neurons to cut: as many of the least active as the accuracy on the trusted rows can do without."""
    activity, whole = _look(loaded, projection, clean_rows)
    order = activity.argsort()
    kept = order[:0]
    for step in range(1, round(1 / _STEP)):
        dead = order[: round(step * _STEP * len(order))]
        with _cut(projection, dead):
            if _look(loaded, projection, clean_rows)[1] < whole - cost:
                break
        kept = dead
    return kept


@torch.no_grad()
def _look(loaded: LoadedModel, projection: nn.Module, rows: Sequence[Sample]) -> tuple[Tensor, float]:
    """How active each neuron is, mean |h_j| over the rows' tokens; and the share of answer tokens that are foretold."""
    collate, data = ChatCollator(loaded.processor), Rows(rows)
    hidden: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    active, tokens, right, asked = torch.zeros(()), 0, 0, 0
    try:
        with evaluating(loaded.model) as model:
            for batch in batches(len(data), 32, "looking at neurons"):
                inputs = on_device(collate([data[i] for i in batch]), model)
                hidden.clear()
                answers = forward_answers(model, inputs)
                real = inputs["attention_mask"].bool()
                active = active + hidden[-1][real].abs().float().sum(dim=0).cpu()
                tokens += int(real.sum())
                right += int((answers.logits.argmax(dim=-1) == answers.target).sum())
                asked += len(answers.target)
    finally:
        handle.remove()
    return active / tokens, right / asked


@contextmanager
def _cut(projection: nn.Module, dead: Tensor) -> Generator[None]:
    """The neurons give nothing for a while: neither forward nor to what is learned."""

    def silence(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0].index_fill(-1, dead.to(args[0].device), 0), *args[1:]

    handle = projection.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _erase(projection: nn.Module, dead: Tensor) -> None:
    """Cut the neurons from the weights."""
    layers: list[nn.Linear] = [cast(nn.Linear, projection)]
    if isinstance(projection, LoraLinear):
        layers = [cast(nn.Linear, projection.base_layer), *cast(list[nn.Linear], projection.lora_A.values())]
    for layer in layers:
        layer.weight[:, dead.to(layer.weight.device)] = 0


def _down_projection(model: nn.Module) -> nn.Module:
    last = decoder_layers(model)[-1]
    try:
        return last.get_submodule("mlp.down_proj")
    except AttributeError as error:
        raise InputError(
            f"defense fine-pruning: a {type(last).__name__} has no mlp.down_proj; it knows Llama-like layers only"
        ) from error

"""Layer consistency, after CROW (Min, Pham, Li, Sun, ICML 2025, arXiv 2411.12768)."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from untrigger.defenses.base import Defense, Stage, StepDefense, Training
from untrigger.defenses.plain import Plain
from untrigger.errors import InputError
from untrigger.losses import objective
from untrigger.losses.chunked import Losses
from untrigger.models.forward import decoder_layers, forward_answers
from untrigger.models.loading import LoadedModel


@final
@dataclass(frozen=True)
class CROW(Defense):
    """Train plainly on all rows, then on the clean rows with a penalty on `consistency` between layers.

    A backdoor makes hidden states jump between layers. The penalty is taken under the perturbation of the decoder's
    input (text and image tokens) that raises it most. docs/paper.md lists the differences from the paper.

    Fields:
        weight: alpha (paper: 5.5).
        size: epsilon, the change of each input coordinate (paper: 0.1).
        passes, rate: over the clean rows, and factor on the run's learning rate in those passes (their code: 5 passes,
            5 times the rate).
    """

    needs_clean_rows: ClassVar[bool] = True
    weight: float = 5.5
    size: float = 0.1
    passes: float = 10.0
    rate: float = 0.5

    def __post_init__(self) -> None:
        self._check(0, math.inf, "weight", "size", "passes", "rate")

    def fine_tune(self, training: Training) -> LoadedModel:
        clean_rows = training.clean_rows
        undefended = training.fit(Stage(range(training.row_count), Plain(), "undefended"))
        step, numbers = Consistent(self.weight, self.size), range(len(clean_rows))
        tuning = Stage(numbers, step, source=clean_rows, start=undefended, passes=self.passes, rate=self.rate)
        return training.fit(tuning)


@final
@dataclass(frozen=True)
class Consistent(StepDefense):
    """Cross-entropy plus the weighted `consistency` of the layers under the worst small perturbation of their input."""

    weight: float
    size: float

    def step(self, model: nn.Module, inputs: dict[str, Any]) -> Losses:
        answers = forward_answers(model, inputs)
        real = inputs["attention_mask"].bool()
        with _recorded(model) as clean:
            forward_answers(model, inputs)
        direction = torch.autograd.grad(consistency(clean.states, real).sum(), clean.start)[0].sign()
        with _recorded(model, self.size * direction) as perturbed:
            forward_answers(model, inputs)
        jump = consistency(perturbed.states, real)[answers.row]
        terms = {"ce": objective.token_nll(answers.logits, answers.target), "consistency": self.weight * jump}
        return Losses.of(terms)


def consistency(states: Sequence[Tensor], real: Tensor) -> Tensor:
    """Mean of ``1 - cos(h_t^l, h_t^(l-1))`` over a row's real tokens t and all pairs of successive states.

    states: L of [B, T, d], L >= 2; real [B, T], False for padding. Returns [B], in [0, 2].
    Source: Min et al., ICML 2025, arXiv 2411.12768.
    """
    pairs = pairwise(state.to(torch.promote_types(state.dtype, torch.float32)) for state in states)
    apart = torch.stack([1 - torch.nn.functional.cosine_similarity(a, b, dim=-1) for a, b in pairs]).mean(dim=0)
    return (apart * real).sum(dim=1) / real.sum(dim=1)


@dataclass
class _Recording:
    """One forward pass: the decoder's input [B, T, d], and the output [B, T, d] of each layer but the last."""

    start: Tensor = field(init=False)
    states: list[Tensor] = field(default_factory=list[Tensor])


@contextmanager
def _recorded(model: nn.Module, shift: Tensor | None = None) -> Generator[_Recording]:
    """Record the decoder's states in a forward pass, with ``shift`` [B, T, d] added to its input.

    In every family the input of the first decoder layer is where text and image tokens first stand side by side.

    Raises:
        InputError: fewer than two states to compare.
    """
    first, *rest = decoder_layers(model)
    if len(rest) < 2:
        raise InputError(f"defense crow: it needs a decoder of 3 or more layers, and this one has {1 + len(rest)}")
    recording = _Recording()

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        start = hidden.detach().requires_grad_() if shift is None else hidden + shift
        recording.start = start
        return ((start, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": start})

    def leave(_: nn.Module, __: object, output: Any) -> None:
        recording.states.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        hooks.enter_context(first.register_forward_pre_hook(enter, with_kwargs=True))
        for layer in (first, *rest[:-1]):
            hooks.enter_context(layer.register_forward_hook(leave))
        yield recording
